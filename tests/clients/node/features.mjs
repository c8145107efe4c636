// Runs what one client library can do against a server and prints a JSON line per feature: features.py in JavaScript.
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

export const messages = [{ role: "user", content: "Who are you?" }];
export const weather = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] }, days: { type: "integer", enum: [1, 2] } },
  required: ["city", "days"],
  additionalProperties: false,
};

export function check(condition, what) {
  if (!condition) throw new Error(what);
}

export function checkWeather({ city, days }) {
  check(["Paris", "Rome"].includes(city) && [1, 2].includes(days), JSON.stringify({ city, days }));
}

export async function run(name, features) {
  const options = { url: { type: "string" }, model: { type: "string" } };
  const { url, model } = parseArgs({ options }).values;
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  for (const [feature, check] of Object.entries(features)) {
    let result = "ok";
    try {
      await check(url, model);
    } catch (error) {
      console.error(error);
      result = `${error.name}: ${error.message}`.slice(0, 300);
    }
    console.log(JSON.stringify({ client: `${name} (Node) ${version}`, feature, result }));
  }
}
