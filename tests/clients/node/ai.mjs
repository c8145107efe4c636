import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { z } from "zod";
import { check, checkWeather, run } from "./features.mjs";

const shape = z.object({ city: z.enum(["Paris", "Rome"]), days: z.union([z.literal(1), z.literal(2)]) });
const tools = { get_weather: ai.tool({ description: "Forecast", inputSchema: shape }) };
const prompt = "Who are you?";
const asked = { prompt, maxOutputTokens: 80, maxRetries: 0 };
const compatible = (baseURL, model) =>
  createOpenAICompatible({ name: "tandem", baseURL, supportsStructuredOutputs: true })(model);

await run("ai", {
  async text(url, model) {
    check((await ai.generateText({ model: compatible(url, model), ...asked })).text, "no text");
  },
  async stream(url, model) {
    let text = "";
    for await (const part of ai.streamText({ model: compatible(url, model), ...asked }).textStream) text += part;
    check(text, "no text");
  },
  async tools(url, model) {
    const answer = await ai.generateText({ model: compatible(url, model), tools, toolChoice: "required", ...asked });
    checkWeather(answer.toolCalls[0].input);
  },
  async object(url, model) {
    const output = ai.Output.object({ schema: shape });
    checkWeather((await ai.generateText({ model: compatible(url, model), output, ...asked })).output);
  },
  async "responses API"(url, model) {
    const provider = createOpenAI({ baseURL: url, apiKey: "none" });
    check((await ai.generateText({ model: provider.responses(model), ...asked })).text, "no text");
  },
  async "Anthropic's API"(url, model) {
    const provider = createAnthropic({ baseURL: url, apiKey: "none" });
    check((await ai.generateText({ model: provider(model), ...asked })).text, "no text");
  },
  async embeddings(url, model) {
    const embedder = createOpenAICompatible({ name: "tandem", baseURL: url }).textEmbeddingModel(model);
    check((await ai.embedMany({ model: embedder, values: ["one", "two"], maxRetries: 0 })).embeddings.length === 2, "none");
  },
});
