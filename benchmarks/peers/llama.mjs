// llama.cpp through node-llama-cpp, on the protocol of cells.py: node llama.mjs PACKAGE FILE. One context with a sequence
// per prompt, so that its own batching puts them into one step. Greedy, and on past the end-of-text token.
import {statSync, readFileSync} from "node:fs";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const THREADS = 2;
const [folder, file] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(`${folder}/dist/index.js`));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error", maxThreads: THREADS});
const model = await llama.loadModel({modelPath: file});

const tell = (message) => console.log("@ladder " + JSON.stringify(message));
const {version} = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
tell({
    version: `node-llama-cpp ${version}, llama.cpp ${llama.llamaCppRelease.release}`,
    weight_bytes: statSync(file).size,
    kv_item_bytes: 2
});

for await (const line of createInterface({input: process.stdin})) {
    const {prompts, n_tokens} = JSON.parse(line);
    const context = await model.createContext({
        sequences: prompts.length,
        contextSize: prompts[0].length + n_tokens + 1,
        threads: {ideal: THREADS, min: THREADS}
    });
    const sequences = prompts.map(() => context.getSequence());
    const times = prompts.map(() => []);
    const tokens = prompts.map(() => []);
    const started = performance.now();
    await Promise.all(prompts.map(async (prompt, k) => {
        for await (const token of sequences[k].evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
            times[k].push((performance.now() - started) / 1000);
            tokens[k].push(token);
            if (tokens[k].length === n_tokens) break;
        }
    }));
    tell({times, tokens});
    await context.dispose();
}
process.exit(0);
