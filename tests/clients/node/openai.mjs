import OpenAI from "openai";
import { check, checkWeather, messages, run, weather } from "./features.mjs";

const client = (baseURL) => new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const tools = [{ type: "function", function: { name: "get_weather", parameters: weather } }];
const schema = { type: "json_schema", json_schema: { name: "weather", schema: weather, strict: true } };

await run("openai", {
  async chat(url, model) {
    const answer = await client(url).chat.completions.create({ model, messages, max_tokens: 20 });
    check(answer.choices[0].message.content, "no text");
  },
  async stream(url, model) {
    const events = client(url).chat.completions.stream({ model, messages, max_tokens: 900 });
    check((await events.finalChatCompletion()).choices[0].message.content, "no text");
  },
  async tools(url, model) {
    const asked = { model, messages, tools, tool_choice: "required", max_tokens: 80 };
    const [call] = (await client(url).chat.completions.create(asked)).choices[0].message.tool_calls;
    checkWeather(JSON.parse(call.function.arguments));
  },
  async "tools, streamed"(url, model) {
    const asked = { model, messages, tools, tool_choice: "required", max_tokens: 80 };
    const final = await client(url).chat.completions.stream(asked).finalChatCompletion();
    checkWeather(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
  },
  async "structured output"(url, model) {
    const asked = { model, messages, response_format: schema, max_tokens: 80 };
    checkWeather(JSON.parse((await client(url).chat.completions.create(asked)).choices[0].message.content));
  },
  async responses(url, model) {
    const answer = await client(url).responses.create({ model, input: "Who are you?", max_output_tokens: 20 });
    check(answer.output_text, "no text");
  },
  async embeddings(url, model) {
    const answer = await client(url).embeddings.create({ model, input: ["one", "two"] });
    check(answer.data.length === 2 && answer.data[0].embedding.length > 100, "no vectors");
  },
  async errors(url, model) {
    const error = await client(url).chat.completions.create({ model, messages, temperature: 9 }).catch((e) => e);
    check(error instanceof OpenAI.BadRequestError && error.param === "temperature", `${error}`);
  },
});
