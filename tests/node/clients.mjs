// Calls a server with one of the JavaScript clients, and prints what the client gives as JSON.
// usage: node clients.mjs CLIENT BASE_URL KEY MODEL
//    or: node clients.mjs call BASE_URL KEY METHOD BODY, for one call of the ollama package
import { Ollama } from "ollama";
import OpenAI from "openai";

const [client, base, key, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "Say hi." }];

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

const clients = {
  async call() {
    const ollama = new Ollama({ host: base, headers: { Authorization: `Bearer ${key}` } });
    const body = JSON.parse(process.argv[6]);
    const given = await ollama[model](body);
    return body.stream ? all(given) : given;
  },
  async ollama() {
    // Its only way to send a key is this option.
    const ollama = new Ollama({ host: base, headers: { Authorization: `Bearer ${key}` } });
    return {
      generate: await ollama.generate({ model, prompt: "Why?" }),
      stream: await all(await ollama.generate({ model, prompt: "Why?", stream: true })),
      chat: await ollama.chat({ model, messages }),
      chatStream: await all(await ollama.chat({ model, messages, stream: true })),
      embed: await ollama.embed({ model, input: ["a", "b"] }),
      list: await ollama.list(),
    };
  },
  async openai() {
    const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: key, maxRetries: 0 });
    const chat = openai.chat.completions;
    return {
      chat: await chat.create({ model, messages }),
      stream: await all(
        await chat.create({ model, messages, stream: true, stream_options: { include_usage: true } }),
      ),
      embed: await openai.embeddings.create({ model, input: "a", encoding_format: "float" }),
      models: (await openai.models.list()).data,
    };
  },
};

try {
  console.log(JSON.stringify(await clients[client]()));
} catch (error) {
  console.log(JSON.stringify({ error: error.name, status: error.status_code ?? error.status ?? null, message: error.message }));
}
