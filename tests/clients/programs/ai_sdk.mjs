// Vercel's AI SDK with its providers of OpenAI (Responses and chat completions) and of Anthropic.
import {readFileSync} from "node:fs";
import {createAnthropic} from "@ai-sdk/anthropic";
import {createOpenAI} from "@ai-sdk/openai";
import {embed, generateObject, generateText, jsonSchema, streamText, tool} from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const asked = JSON.parse(readFileSync(0, "utf8"));
const server = {baseURL: `${asked.url}/v1`, apiKey: asked.key};
const openai = createOpenAI(server);
const models = {responses: openai(asked.chat), chat: openai.chat(asked.chat), messages: createAnthropic(server)(asked.chat)};
const tools = {
    [asked.tool.name]: tool({description: asked.tool.description, inputSchema: jsonSchema(asked.tool.parameters)}),
};

const answers = {};
for (const [name, model] of Object.entries(models)) {
    const given = {model, messages: asked.hello, temperature: 0, maxRetries: 0};
    const forced = {...given, tools, toolChoice: "required"};
    const call = (calls) => ({name: calls[0].toolName, arguments: calls[0].input});
    const pieces = [];
    for await (const piece of streamText(given).textStream) pieces.push(piece);
    const stream = streamText(forced);
    await stream.consumeStream();
    answers[`by_${name}`] = (await generateText(given)).text;
    answers[`pieces_by_${name}`] = pieces;
    answers[`required_by_${name}`] = call((await generateText(forced)).toolCalls);
    answers[`streamed_call_by_${name}`] = call(await stream.toolCalls);
    answers[`structured_by_${name}`] = (await generateObject({...given, schema: jsonSchema(asked.schema)})).object;
}
const embedded = await embed({model: openai.textEmbeddingModel(asked.base), value: asked.text, maxRetries: 0});
console.log(JSON.stringify({...answers, embedding: embedded.embedding}));
