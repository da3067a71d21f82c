// pi's own credential code, unchanged, on a given auth.json: AuthStorage, the provider's OAuth refresh and the lock.
// node pi_client.mjs --modules DIR --auth FILE [--providers a,b] [--pace MS] [--seconds N] [--starts N] [--call]
// Ends at SIGTERM, at the end of its input, or after N seconds, and prints one line of JSON.
// HTTPS_PROXY leads its calls to the local servers (pi honours it), NODE_EXTRA_CA_CERTS makes it trust them.
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { pathToFileURL } from "node:url";

const { values: options } = parseArgs({ options: {
    modules: { type: "string" }, auth: { type: "string" }, providers: { type: "string", default: "anthropic" },
    pace: { type: "string", default: "300" }, seconds: { type: "string", default: "1000000" },
    starts: { type: "string", default: "10" }, call: { type: "boolean", default: false } } });
const root = join(options.modules, "node_modules", "@earendil-works");
const load = (...path) => import(pathToFileURL(join(root, ...path)).href);
const { AuthStorage } = await load("pi-coding-agent", "dist", "core", "auth-storage.js");
const { configureHttpDispatcher } = await load("pi-coding-agent", "dist", "core", "http-dispatcher.js");
const { createModels } = await load("pi-ai", "dist", "index.js");
const { builtinProviders } = await load("pi-ai", "dist", "providers", "all.js");

configureHttpDispatcher();
const storage = AuthStorage.create(options.auth);
const models = createModels({ credentials: storage });
for (const provider of builtinProviders()) models.setProvider(provider);

const stats = { calls: 0, ok: 0, missing: 0, slowest_ms: 0, errors: {}, statuses: {} };
const count = (table, key) => { table[key] = (table[key] ?? 0) + 1; };
const brief = (text) => text.replace(/[\w-]{24,}/g, "...").slice(0, 300);
const blame = (error) => count(stats.errors, brief(String(error?.message ?? error)));
let stopping = false;
process.on("SIGTERM", () => { stopping = true; });
process.stdin.on("end", () => { stopping = true; }).on("error", () => {}).resume();

async function use(provider, auth) {
    const token = auth.apiKey ?? Object.values(auth.headers ?? {}).join().replace(/^Bearer /, "");
    const isClaude = provider === "anthropic";
    const reply = await fetch(isClaude ? "https://api.anthropic.com/v1/messages"
        : "https://chatgpt.com/backend-api/codex/responses", {
        method: "POST",
        headers: { authorization: `Bearer ${token}`, "content-type": "application/json", "user-agent": "pi",
                   "anthropic-version": "2023-06-01", "anthropic-beta": "oauth-2025-04-20" },
        body: JSON.stringify(isClaude ? { model: "m", max_tokens: 9, messages: [{ role: "user", content: "hi" }] }
            : { model: "m", stream: true, store: false, instructions: "-", input: [] }) });
    await reply.arrayBuffer();
    count(stats.statuses, reply.status);
}

async function once(provider) {
    stats.calls++;
    const started = Date.now();
    try {
        const result = await models.getAuth(provider);
        stats.slowest_ms = Math.max(stats.slowest_ms, Date.now() - started);
        if (!result) { stats.missing++; return; }
        stats.ok++;
        if (options.call) await use(provider, result.auth);
    } catch (error) { blame(error); }
}

const end = Date.now() + Number(options.seconds) * 1000;
process.stdout.write("ready\n");
let turn = 0;
while (!stopping && Date.now() < end) {
    // a start of pi takes the lock synchronously, and steals one that was not touched for 10 s
    if (++turn % Number(options.starts) === 0) AuthStorage.create(options.auth).reload();
    await Promise.all(options.providers.split(",").map(once));
    await sleep(Number(options.pace) * (0.5 + Math.random()));
}
process.stdout.write(JSON.stringify(stats) + "\n", () => process.exit(0));
