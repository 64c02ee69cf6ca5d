// OpenAI's own client in Node against a frontend: node openai_client.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me about the sea" }];
const options = { model: "tiny", messages, seed: 1, max_tokens: 12 };

const whole = await client.chat.completions.create(options);
assert.ok(whole.choices[0].message.content);
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.usage.completion_tokens, 12);

let text = "";
let usage;
const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(usage, whole.usage);

const accumulated = await client.chat.completions.stream(options).finalChatCompletion();
assert.equal(accumulated.choices[0].message.content, text);

const response = await client.responses.create({ model: "tiny", input: "Tell me about the sea", temperature: 0 });
assert.equal(response.status, "completed");
const kinds = [];
for await (const event of await client.responses.create({ model: "tiny", input: "The sea", temperature: 0, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.equal(kinds.at(-1), "response.completed");

await assert.rejects(client.chat.completions.create({ ...options, model: "nobody" }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.match(error.message, /there is no model 'nobody'/);
  assert.ok(error.requestID);
  return true;
});
await assert.rejects(client.chat.completions.create({ ...options, temperature: -1 }), OpenAI.BadRequestError);

const abort = new AbortController();
const endless = await client.chat.completions.create(
  { ...options, max_tokens: 4000, ignore_eos: true, stream: true },
  { signal: abort.signal },
);
let count = 0;
for await (const chunk of endless) {
  if (chunk.choices[0]?.delta?.content && ++count === 3) abort.abort();
}
assert.ok(count < 4000);

const models = await client.models.list();
assert.deepEqual(models.data.map((model) => model.id).sort(), ["tiny", "weather"]);
// tools: the client's own loop, which answers calls until there are no more
const weather = {
  name: "get_weather",
  description: "The weather of a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};
for (const stream of [false, true]) {
  const called = [];
  const runner = client.chat.completions.runTools({
    model: "weather",
    stream,
    messages: [{ role: "user", content: "How is the weather in Lisbon?" }],
    tools: [{ type: "function", function: { ...weather, parse: JSON.parse, function: ({ city }) => (called.push(city), `sunny in ${city}`) } }],
  });
  assert.equal(await runner.finalContent(), "It is sunny in Lisbon.");
  assert.deepEqual(called, ["Lisbon"]);
}
const called = await client.responses.create({ model: "weather", input: "How is the weather in Lisbon?", tools: [{ type: "function", ...weather, strict: false }] });
assert.equal(called.output.find((item) => item.type === "function_call").arguments, '{"city": "Lisbon"}');
assert.equal(called.output[0].type, "reasoning");

console.log("all is well");
