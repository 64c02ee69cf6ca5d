// A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.
//
//   npm ci
//   buf generate ../../../protos --path ../../../protos/dynamo_grpc/v1 --path ../../../protos/google/rpc
//   npm run build && node dist/client.js HOST:PORT [TEXT]
//
// HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.
import { promisify } from "node:util";

import { credentials, Metadata, type ServiceError, status } from "@grpc/grpc-js";

import { ControlClient, type DescribeResponse } from "./gen/dynamo_grpc/v1/control.js";
import {
  FinishReason,
  type GenerateResponse,
  InferenceClient,
  PreprocessedRequest,
  Usage,
} from "./gen/dynamo_grpc/v1/inference.js";
import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

async function main(address: string, text: string): Promise<number> {
  const control = new ControlClient(address, credentials.createInsecure());
  const inference = new InferenceClient(address, credentials.createInsecure());
  try {
    const model = await listModels(control);
    await stream(inference, ask(model, text, 8));
    await cancel(inference, ask(model, text, 4000));
    await deadline(inference, ask(model, text, 4000));
  } catch (error) {
    printError(error as ServiceError);
    return 1;
  }
  await promisify(inference.generateOnce.bind(inference) as Once)(ask("no-such-model", text, 1)).catch(printError);
  return 0;
}

type Describe = (request: object, done: (error: ServiceError | null, answer: DescribeResponse) => void) => void;
type Once = (request: PreprocessedRequest, done: (error: ServiceError | null, answer: GenerateResponse) => void) => void;

function ask(model: string, text: string, maxTokens: number): PreprocessedRequest {
  return PreprocessedRequest.fromPartial({
    model,
    samplingOptions: { temperature: 0 },
    stopConditions: { maxTokens, ignoreEos: true },
    ...(text ? { text } : { tokenIds: [5, 6, 7] }),
  });
}

async function listModels(control: ControlClient): Promise<string> {
  const { cards } = await promisify(control.describe.bind(control) as Describe)({});
  console.log("models:", ...cards.map((card) => card.name));
  return cards[0].name;
}

async function stream(inference: InferenceClient, request: PreprocessedRequest): Promise<void> {
  const tokenIds: number[] = [];
  let text = "";
  let reason = FinishReason.FINISH_REASON_UNSPECIFIED;
  let usage = Usage.fromPartial({});
  for await (const output of inference.generate(request) as AsyncIterable<GenerateResponse>) {
    for (const delta of output.choices) {
      tokenIds.push(...delta.tokenIds);
      text += delta.text ?? "";
      reason = delta.finish?.reason ?? reason;
    }
    usage = output.usage ?? usage;
  }
  console.log("tokens:", ...tokenIds);
  if (text) {
    console.log("text:", text);
  }
  console.log(`finished: ${FinishReason[reason]}, ${usage.promptTokens} prompt tokens, ${usage.completionTokens} generated`);
}

async function cancel(inference: InferenceClient, request: PreprocessedRequest): Promise<void> {
  const call = inference.generate(request);
  let numOutputs = 0;
  try {
    for await (const _ of call) {
      if (++numOutputs === 3) {
        call.cancel();
        break;
      }
    }
    await new Promise((_, failed) => call.on("error", failed));
  } catch (error) {
    check(error as ServiceError, status.CANCELLED);
    console.log(`cancelled after ${numOutputs} outputs: CANCELLED`);
  }
}

async function deadline(inference: InferenceClient, request: PreprocessedRequest): Promise<void> {
  try {
    for await (const _ of inference.generate(request, new Metadata(), { deadline: Date.now() + 300 }));
  } catch (error) {
    check(error as ServiceError, status.DEADLINE_EXCEEDED);
    console.log("deadline: DEADLINE_EXCEEDED");
  }
}

function check(error: ServiceError, wanted: status): void {
  if (error.code !== wanted) {
    throw error;
  }
}

// The status, and of its details the reason, the field that is wrong and when to come back.
function printError(error: ServiceError): void {
  let said = status[error.code];
  const [packed] = error.metadata.get("grpc-status-details-bin");
  for (const { typeUrl, value } of packed ? Status.decode(packed as Buffer).details : []) {
    switch (typeUrl.slice(typeUrl.lastIndexOf(".") + 1)) {
      case "ErrorInfo":
        said += ` ${ErrorInfo.decode(value).reason}`;
        break;
      case "RetryInfo": {
        const { seconds, nanos } = RetryInfo.decode(value).retryDelay ?? { seconds: 0n, nanos: 0 };
        said += `, again after ${(Number(seconds) + nanos / 1e9).toFixed(1)} s`;
        break;
      }
      case "BadRequest":
        said += `, field ${BadRequest.decode(value).fieldViolations[0].field}`;
    }
  }
  console.log(`error: ${said}: ${error.details}`);
}

const [address, text = ""] = process.argv.slice(2);
if (!address) {
  console.error("usage: client HOST:PORT [TEXT]");
  process.exit(2);
}
process.exit(await main(address, text));
