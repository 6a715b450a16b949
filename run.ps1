# Starts OllProx on Windows: .\run.ps1, with the arguments of ollprox.py.
# Where scripts are not allowed: powershell -ExecutionPolicy Bypass -File run.ps1
$ErrorActionPreference = "Stop"
$python = Join-Path $PSScriptRoot ".venv\Scripts\python.exe"
if (-not (Test-Path $python)) {
    $base = if (Get-Command py -ErrorAction SilentlyContinue) { "py" } else { "python" }
    & $base -m venv (Join-Path $PSScriptRoot ".venv")
}
& $python -m pip install -q --disable-pip-version-check --require-hashes -r (Join-Path $PSScriptRoot "requirements.txt")
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
& $python (Join-Path $PSScriptRoot "ollprox.py") @args
exit $LASTEXITCODE
