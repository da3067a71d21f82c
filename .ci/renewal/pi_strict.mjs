// pi's strict read-only loader on files: node pi_strict.mjs --modules DIR FILE...  Exit status 1 when it refuses one.
import { join } from "node:path";
import { parseArgs } from "node:util";
import { pathToFileURL } from "node:url";

const { values, positionals } = parseArgs({ options: { modules: { type: "string" } }, allowPositionals: true });
const module = join(values.modules, "node_modules", "@earendil-works", "pi-coding-agent", "dist", "core",
    "auth-storage.js");
const { ReadOnlyAuthStorage } = await import(pathToFileURL(module).href);
for (const file of positionals) {
    try {
        const entries = Object.keys(new ReadOnlyAuthStorage(file).load());
        console.log(`ok ${file}: ${entries.length} entries`);
    } catch (error) {
        console.log(`error ${file}: ${error.message}`);
        process.exitCode = 1;
    }
}
