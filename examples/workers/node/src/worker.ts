// A worker in Node: it streams the tokens of its prompt back, one at a time.
//
//   dynamo-grpc card MODEL_FOLDER --name echo > card.json
//   npm ci
//   buf generate ../../../protos --path ../../../protos/dynamo_grpc/v1 --path ../../../protos/google/rpc
//   npm run build && node dist/worker.js --card card.json --files MODEL_FOLDER
//
// It registers in etcd under a lease (ETCD_ENDPOINTS), serves Generate, answers health checks, obeys cancels, deadlines
// and SIGTERM. answer.ts is what another model would replace.
import { randomBytes } from "node:crypto";
import { accessSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";

import { Server, ServerCredentials } from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";

import { ControlService } from "./gen/dynamo_grpc/v1/control.js";
import { InferenceService } from "./gen/dynamo_grpc/v1/inference.js";
import { EndpointKind, Instance, ModelCard } from "./gen/dynamo_grpc/v1/model_card.js";
import { Registration } from "./registry.js";
import { Worker } from "./service.js";

const { values: options } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:0" }, // to listen on
    advertise: { type: "string", default: "" }, // to register, where others reach it by another one
    card: { type: "string", default: "card.json" }, // as `dynamo-grpc card` prints it
    files: { type: "string", default: "." }, // the model folder, with the card's files
    "pause-ms": { type: "string", default: "5" }, // time that a token takes
    "max-concurrent": { type: "string", default: "64" }, // requests at once; others are refused
    "grace-s": { type: "string", default: "30" }, // how long running requests may take after SIGTERM
  },
});

const card = ModelCard.fromJSON(JSON.parse(readFileSync(options.card, "utf8")));
for (const { name } of card.files) {
  accessSync(join(options.files, name)); // before a frontend asks for it
}
const instance = Instance.fromPartial({
  namespace: "dynamo",
  component: "backend",
  endpoint: "generate",
  instanceId: randomBytes(8).readBigUInt64BE(),
  epoch: 1n,
  kind: EndpointKind.ENDPOINT_KIND_MODEL,
  model: card.name,
  cardChecksum: card.checksum,
});
const worker = new Worker(card, instance, options.files, Number(options["pause-ms"]), Number(options["max-concurrent"]));
const services = ["", "dynamo_grpc.v1.Inference", `model/${card.name}`];
const health = new HealthImplementation(Object.fromEntries(services.map((name) => [name, "NOT_SERVING"])));
const server = new Server({ "grpc.max_receive_message_length": 64 << 20 });
server.addService(InferenceService, worker.inference);
server.addService(ControlService, worker.control);
health.addToServer(server);

const port = await new Promise<number>((done, failed) =>
  server.bindAsync(options.address, ServerCredentials.createInsecure(), (error, port) => (error ? failed(error) : done(port))),
);
instance.address = options.advertise || `${options.address.slice(0, options.address.lastIndexOf(":"))}:${port}`;

const told = new Promise<void>((done) => {
  process.once("SIGTERM", done);
  process.once("SIGINT", done);
  worker.onDrain = done; // Control.Drain
});
const registration = new Registration(instance, card);
if ((await Promise.race([registration.start(), told.then(() => "told")])) === "told") {
  process.exit(0);
}
worker.isReady = true;
for (const name of services) {
  health.setStatus(name, "SERVING");
}
const id = instance.instanceId.toString(16).padStart(16, "0");
console.log(`worker ready at ${instance.address} (model ${card.name}, instance ${id})`);

await told;
worker.isDraining = true;
for (const name of services) {
  health.setStatus(name, "NOT_SERVING");
}
await registration.end(); // nobody finds it any more
if ((await Promise.race([worker.idle(), sleep(Number(options["grace-s"]) * 1000, "late")])) === "late") {
  console.error("requests still run and are handed over");
  worker.handOver();
}
// what was sent last must arrive, its status too; but nobody waits for a client that doesn't read
await Promise.race([new Promise((done) => server.tryShutdown(done)), sleep(2000)]);
process.exit(0);
