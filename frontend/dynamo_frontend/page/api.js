// What the HTTP API takes and answers, from /openapi.json.
let described = null;

export async function showApi() {
  if (described) return;
  const view = document.getElementById("operations");
  try {
    const answer = await fetch("/openapi.json");
    if (!answer.ok) throw new Error(answer.statusText);
    described = await answer.json();
  } catch {
    view.textContent = "the frontend does not answer";
    return;
  }
  const operations = Object.entries(described.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) => operation(path, method, about)),
  );
  view.replaceChildren(...operations);
}

function operation(path, method, about) {
  const line = element("summary", "", element("code", "method", method.toUpperCase()), element("code", "", path));
  line.append(element("span", "about", about.summary));
  const body = about.requestBody?.content["application/json"].schema;
  return folded(line, () => [
    ...(about.parameters ?? []).map((one) => element("p", "about", `${one.in} ${one.name}: ${typeOf(one.schema)}`)),
    ...(body ? [element("h2", "", "Body"), fields(body)] : []),
    element("h2", "", "Answers"),
    answers(about.responses),
  ]);
}

// Contents are made when they are first opened: schemas may contain themselves.
function folded(summary, make) {
  const made = element("details", "", summary);
  made.addEventListener("toggle", () => made.append(...make()), { once: true });
  return made;
}

function fields(schema) {
  const { properties = {}, required = [] } = resolved(schema);
  const names = Object.keys(properties).sort((a, b) => required.includes(b) - required.includes(a));
  const rows = names.flatMap((name) => {
    const [field, needed] = [properties[name], required.includes(name)];
    const cells = [element("td", "long", typeOf(field)), element("td", "long", field.description ?? "")];
    const row = element("tr", "", element("td", "", element("code", needed ? "needed" : "", name)), ...cells);
    const inner = objectIn(field);
    if (!inner) return [row];
    const below = element("td", "inner", folded(element("summary", "", `the fields of ${name}`), () => [fields(inner)]));
    below.colSpan = 3;
    return [row, element("tr", "", below)];
  });
  return table(["field", "what it takes", "about"], rows);
}

function answers(responses) {
  const rows = Object.entries(responses).map(([status, { description, content = {} }]) => {
    const types = Object.entries(content).map(([type, { schema }]) => {
      const names = Object.keys(resolved(schema).properties ?? {});
      return element("div", "", names.length ? `${type}: ${names.join(", ")}` : type);
    });
    return element("tr", "", element("td", "", status), element("td", "long", description), element("td", "long", ...types));
  });
  return table(["status", "when", "what"], rows);
}

const resolved = (schema) => (schema.$ref ? described.components.schemas[schema.$ref.split("/").at(-1)] : schema);

const choices = (schema) => resolved(schema).anyOf ?? resolved(schema).oneOf ?? [resolved(schema)];

// The object with fields that a field takes: itself, one of its alternatives, or what it is a list of.
function objectIn(schema) {
  const found = choices(schema).flatMap((one) => [one, ...(resolved(one).items ? choices(resolved(one).items) : [])]);
  return found.map(resolved).find((one) => one.properties);
}

function typeOf(schema) {
  const kinds = choices(schema).map(resolved).filter((one) => one.type !== "null");
  const told = [...new Set(kinds.map(kind))].join(" or ") || "anything";
  const first = schema.default;
  return first === undefined || first === null ? told : `${told}; ${JSON.stringify(first)} if not given`;
}

function kind(schema) {
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}${bounds(schema.minItems, schema.maxItems)}`;
  if (schema.type === "string") return `string${bounds(schema.minLength, schema.maxLength)}`;
  if (schema.type === undefined) return "anything";
  const above = schema.exclusiveMinimum === undefined ? undefined : `above ${number(schema.exclusiveMinimum)}`;
  const below = schema.exclusiveMaximum === undefined ? undefined : `below ${number(schema.exclusiveMaximum)}`;
  return schema.type + bounds(above ?? schema.minimum, below ?? schema.maximum);
}

function bounds(low, high) {
  const [from, to] = [low, high].map((one) => (typeof one === "number" ? number(one) : one));
  if (from === undefined) return to === undefined ? "" : ` (up to ${to})`;
  return to === undefined ? ` (from ${from})` : ` (${from} … ${to})`;
}

// Powers of two are too long to read, and to be told exactly.
function number(value) {
  const power = Math.log2(Math.abs(value));
  return power >= 31 && Number.isInteger(power) ? `${value < 0 ? "-" : ""}2^${power}` : String(value);
}

function table(names, rows) {
  const head = element("tr", "", ...names.map((name) => element("th", "", name)));
  return element("div", "scroll", element("table", "", head, ...rows));
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
