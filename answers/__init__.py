"""Questions and answers: routes, cache keys, flights, the queue, and stored answers."""
