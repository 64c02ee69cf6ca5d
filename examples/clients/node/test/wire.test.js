// The golden wire files, read and written again: an option that is zero, or a field that isn't known, would be lost.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import * as control from "../dist/gen/dynamo_grpc/v1/control.js";
import * as endpoint from "../dist/gen/dynamo_grpc/v1/endpoint.js";
import * as inference from "../dist/gen/dynamo_grpc/v1/inference.js";
import * as card from "../dist/gen/dynamo_grpc/v1/model_card.js";
import * as orca from "../dist/gen/dynamo_grpc/v1/orca.js";

const folder = new URL("../../../../tests/wire/", import.meta.url);
const types = { ...control, ...endpoint, ...inference, ...card, ...orca };
const names = readdirSync(folder).filter((name) => name.endsWith(".binpb"));
assert(names.length > 100);

for (const name of names) {
  test(name, () => {
    const data = readFileSync(new URL(name, folder));
    const type = types[name.slice(0, name.indexOf("."))];
    assert.deepEqual(Buffer.from(type.encode(type.decode(data)).finish()), data);
  });
}
