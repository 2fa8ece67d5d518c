// llama.cpp through node-llama-cpp. Reads {model, texts, prompts, n} from stdin; writes the token ids of each text, and
// for each prompt n greedy ids, each with the 20 likeliest ids and their probabilities.
import {readFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: asked.model});
const tokens = asked.texts.map((text) => Array.from(model.tokenize(text, false)));
const answers = [];
for (const prompt of asked.prompts) {
    const context = await model.createContext({contextSize: 512, sequences: 1});
    const sequence = context.getSequence();
    const wanted = {generateNext: {probabilities: true, token: true, options: {temperature: 0}}};
    const answer = [];
    let next = prompt;
    for (let step = 0; step < asked.n; step++) {
        const last = next.length - 1;
        const found = await sequence.controlledEvaluate(next.map((id, at) => (at === last ? [id, wanted] : id)));
        const {token, probabilities} = found[last].next;
        answer.push({token, likeliest: Array.from(probabilities.entries()).slice(0, 20)});
        next = [token];
    }
    answers.push(answer);
    await context.dispose();
}
console.log(JSON.stringify({tokens, answers}));
process.exit(0);
