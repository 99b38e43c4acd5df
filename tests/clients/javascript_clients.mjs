// Call a running server with the JavaScript clients that people use.
// Usage: node javascript_clients.mjs URL MODEL. Prints one JSON line per use, as python_clients.py.

import fs from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { constructLlmApi } from "@continuedev/openai-adapters";
import { ChatOpenAI } from "@langchain/openai";
import { embed, generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const baseURL = url.replace(/\/$/, "") + "/v1";
const apiKey = "none";
const messages = [{ role: "user", content: "Name a city in France. One word." }];
const city = z.object({
  name: z.enum(["Paris", "Lyon", "Nice"]),
  millions: z.number().int().min(0).max(99),
});
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 30 } },
      required: ["city"],
    },
  },
};

const check = (ok, what = "unexpected answer") => {
  if (!ok) throw new Error(what);
};
const version = (name) => {
  const file = new URL(`node_modules/${name}/package.json`, `file://${process.cwd()}/`);
  return `${name} ${JSON.parse(fs.readFileSync(file)).version}`;
};
const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const compatible = createOpenAICompatible({
  name: "lamoe",
  baseURL,
  apiKey,
  supportsStructuredOutputs: true,
});
const chat = (options) =>
  new ChatOpenAI({ model, apiKey, maxRetries: 0, configuration: { baseURL }, ...options });
const continueApi = constructLlmApi({ provider: "openai", apiKey, apiBase: baseURL });

const uses = [
  ["openai", "chat.completions.create", async () => {
    const reply = await openai.chat.completions.create({ model, messages, max_tokens: 8 });
    check(reply.choices[0].message.content);
  }],
  ["openai", "chat, streamed", async () => {
    let text = "";
    const stream = await openai.chat.completions.create({
      model, messages, max_tokens: 8, stream: true, stream_options: { include_usage: true },
    });
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    check(text);
  }],
  ["openai", "tool_choice by name", async () => {
    const reply = await openai.chat.completions.create({
      model, messages, max_tokens: 80, tools: [weather],
      tool_choice: { type: "function", function: { name: "get_weather" } },
    });
    check(JSON.parse(reply.choices[0].message.tool_calls[0].function.arguments).city !== undefined);
  }],
  ["openai", "embeddings", async () => {
    const reply = await openai.embeddings.create({ model, input: "a" });
    check(reply.data[0].embedding.length > 10);
  }],
  ["ai", "generateText, @ai-sdk/openai-compatible", async () => {
    const { text } = await generateText({
      model: compatible(model), messages, maxOutputTokens: 8, maxRetries: 0,
    });
    check(text);
  }],
  ["ai", "streamText, @ai-sdk/openai-compatible", async () => {
    let text = "";
    const { textStream } = streamText({
      model: compatible(model), messages, maxOutputTokens: 8, maxRetries: 0,
      onError: ({ error }) => { throw error; },
    });
    for await (const part of textStream) text += part;
    check(text);
  }],
  ["ai", "generateObject, @ai-sdk/openai-compatible", async () => {
    const { object } = await generateObject({
      model: compatible(model), schema: city, messages, maxOutputTokens: 200, maxRetries: 0,
    });
    city.parse(object);
  }],
  ["ai", "tools, toolChoice required", async () => {
    const { toolCalls } = await generateText({
      model: compatible(model), messages, maxOutputTokens: 200, maxRetries: 0,
      tools: { get_weather: tool({ inputSchema: z.object({ city: z.string().max(30) }) }) },
      toolChoice: "required",
    });
    check(toolCalls[0].toolName === "get_weather");
  }],
  ["ai", "generateText, @ai-sdk/openai (chat)", async () => {
    const { text } = await generateText({
      model: createOpenAI({ baseURL, apiKey }).chat(model), messages, maxOutputTokens: 8,
      maxRetries: 0,
    });
    check(text);
  }],
  ["ai", "embed, @ai-sdk/openai-compatible", async () => {
    const { embedding } = await embed({
      model: compatible.textEmbeddingModel(model), value: "a", maxRetries: 0,
    });
    check(embedding.length > 10);
  }],
  ["@langchain/openai", "ChatOpenAI.invoke", async () => {
    check((await chat({ maxTokens: 8 }).invoke("Say hello")).content);
  }],
  ["@langchain/openai", "ChatOpenAI.stream", async () => {
    let text = "";
    for await (const part of await chat({ maxTokens: 8 }).stream("Say hello")) text += part.content;
    check(text);
  }],
  ["@langchain/openai", "withStructuredOutput, jsonSchema", async () => {
    const structured = chat({ maxTokens: 200 }).withStructuredOutput(city, {
      method: "jsonSchema",
    });
    city.parse(await structured.invoke("A city?"));
  }],
  ["@langchain/openai", "withStructuredOutput, functionCalling", async () => {
    const structured = chat({ maxTokens: 200 }).withStructuredOutput(city, {
      method: "functionCalling",
    });
    city.parse(await structured.invoke("A city?"));
  }],
  ["@continuedev/openai-adapters", "chat, streamed", async () => {
    let text = "";
    const body = { model, messages, max_tokens: 8, stream: true };
    const stream = continueApi.chatCompletionStream(body, new AbortController().signal);
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    check(text);
  }],
  ["@continuedev/openai-adapters", "tab completion (completions, streamed)", async () => {
    let text = "";
    const body = { model, prompt: "def add(a, b):", max_tokens: 8, stream: true, stop: ["\n\n"] };
    const stream = continueApi.completionStream(body, new AbortController().signal);
    for await (const chunk of stream) text += chunk.choices[0]?.text ?? "";
    check(text);
  }],
  ["@continuedev/openai-adapters", "models list", async () => {
    check((await continueApi.list()).length > 0);
  }],
];

let failures = 0;
for (const [name, use, run] of uses) {
  let detail = "";
  try {
    await run();
  } catch (error) {
    failures += 1;
    detail = `${error.name}: ${error.message}`.slice(0, 600);
  }
  console.log(JSON.stringify({ client: version(name), use, ok: !detail, detail }));
}
process.exit(failures ? 1 : 0);
