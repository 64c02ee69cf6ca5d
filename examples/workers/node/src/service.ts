import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

import { type handleServerStreamingCall, type handleUnaryCall, type ServerWritableStream, status } from "@grpc/grpc-js";

import { answer, Generation } from "./answer.js";
import { failure, refusal } from "./check.js";
import {
  type ControlServer,
  DescribeResponse,
  type GetFileRequest,
  GetFileResponse,
  WorkerState,
} from "./gen/dynamo_grpc/v1/control.js";
import {
  FinishReason,
  type GenerateResponse,
  type InferenceServer,
  type PreprocessedRequest,
} from "./gen/dynamo_grpc/v1/inference.js";
import type { Instance, ModelCard } from "./gen/dynamo_grpc/v1/model_card.js";

type Call = ServerWritableStream<PreprocessedRequest, GenerateResponse>;
type Ending = "stopped" | "handed over";

// eslint-disable-next-line @typescript-eslint/no-explicit-any
const unimplemented: handleUnaryCall<any, any> & handleServerStreamingCall<any, any> = (call: any, done?: any) => {
  const error = failure(status.UNIMPLEMENTED, "UNSUPPORTED", "not implemented by this worker");
  done ? done(error) : call.emit("error", error);
};

/** Serves one model. GenerateOnce, Deliver, Embed and most of Control answer UNIMPLEMENTED. */
export class Worker {
  isReady = false;
  isDraining = false;
  onDrain = () => {};
  private readonly running = new Map<Call, { id: string; end: (how: Ending) => void }>();
  private wake = () => {};

  constructor(
    private readonly card: ModelCard,
    private readonly instance: Instance,
    private readonly folder: string,
    private readonly pauseMs: number,
    private readonly maxConcurrent: number,
  ) {}

  get inference(): InferenceServer {
    return {
      generate: (call) => void this.generate(call),
      generateOnce: unimplemented,
      deliver: unimplemented,
      embed: unimplemented,
    };
  }

  get control(): ControlServer {
    return {
      describe: (_, done) => done(null, this.describe()),
      getFile: (call) => void this.getFile(call).catch((error) => fail(call, error)),
      // without an id it is nobody's to stop
      stop: ({ request: { requestId } }, done) =>
        done(null, { found: requestId !== "" && this.end("stopped", requestId) }),
      drain: (_, done) => {
        this.isDraining = true;
        this.onDrain();
        done(null, { numRequests: this.running.size });
      },
      watchLoad: unimplemented,
      subscribeKvEvents: unimplemented,
      getMetrics: unimplemented,
      loadLora: unimplemented,
      unloadLora: unimplemented,
      listLoras: unimplemented,
    };
  }

  /** Returns when nothing runs. */
  async idle(): Promise<void> {
    while (this.running.size) {
      await new Promise<void>((done) => (this.wake = done));
    }
  }

  /** Ends what runs so that its clients take it elsewhere. */
  handOver(): void {
    this.end("handed over");
  }

  private end(how: Ending, id?: string): boolean {
    const found = [...this.running.values()].filter((request) => id === undefined || request.id === id);
    found.forEach((request) => request.end(how));
    return found.length > 0;
  }

  // The call's own end is the request's: a cancel, a deadline, a client that is gone.
  private async generate(call: Call): Promise<void> {
    const request = call.request;
    const refused = this.isDraining
      ? failure(status.UNAVAILABLE, "DRAINING", "this worker is draining: try another instance")
      : (refusal(request, this.card) ??
        (this.running.size >= this.maxConcurrent
          ? failure(status.RESOURCE_EXHAUSTED, "OVERLOADED", "this worker is full", "", 1)
          : undefined));
    if (refused) {
      call.emit("error", refused);
      return;
    }
    const aborting = new AbortController();
    let how: Ending | undefined;
    call.once("cancelled", () => aborting.abort());
    const [id = request.requestId] = call.metadata.get("x-request-id");
    this.running.set(call, { id: String(id), end: (wanted) => ((how = wanted), aborting.abort()) });
    try {
      const generation = new Generation(request, this.card, this.instance);
      let isDone = false;
      for await (const token of answer(request, this.pauseMs, aborting.signal)) {
        const [output, isLast] = generation.output(token);
        isDone = isLast;
        if (!call.write(output) && !aborting.signal.aborted) {
          await drained(call, aborting.signal);
        }
        if (isLast || aborting.signal.aborted) {
          break;
        }
      }
      if (how === "handed over") {
        const text = "this worker leaves: take the request elsewhere";
        call.emit("error", failure(status.UNAVAILABLE, "ENGINE_SHUTDOWN", text));
      } else if (!call.cancelled) {
        if (!isDone) {
          const reason = how ? FinishReason.FINISH_REASON_CANCELLED : FinishReason.FINISH_REASON_STOP;
          call.write(generation.last([], { reason }));
        }
        call.end();
      }
    } catch (error) {
      fail(call, error); // the model's own: others go on
    } finally {
      this.running.delete(call);
      this.wake();
    }
  }

  private describe(): DescribeResponse {
    return DescribeResponse.fromPartial({
      instances: [this.instance],
      cards: [this.card],
      state: this.isDraining
        ? WorkerState.WORKER_STATE_DRAINING
        : this.isReady
          ? WorkerState.WORKER_STATE_READY
          : WorkerState.WORKER_STATE_STARTING,
      numRequests: this.running.size,
      measuredAt: new Date(),
    });
  }

  private async getFile(call: ServerWritableStream<GetFileRequest, GetFileResponse>): Promise<void> {
    const file = this.card.files.find((file) => file.sha256 === call.request.sha256);
    if (!file) {
      const text = "no file with this hash belongs to the model card";
      call.emit("error", failure(status.NOT_FOUND, "FILE_NOT_FOUND", text));
      return;
    }
    const data = await readFile(join(this.folder, file.name));
    for (let start = 0; start < data.length; start += 1 << 18) {
      call.write({ data: data.subarray(start, start + (1 << 18)) });
    }
    call.end();
  }
}

/** Returns when the client has taken enough, or the request has ended. */
async function drained(call: Call, signal: AbortSignal): Promise<void> {
  await once(call, "drain", { signal }).catch(() => {});
}

/** Ends a call whose work broke; the client is told that, and the log what it was. */
function fail(call: { emit(event: "error", error: object): boolean }, error: unknown): void {
  console.error("a call failed:", error);
  const text = "it failed: the worker's log says how";
  call.emit("error", failure(status.INTERNAL, "INTERNAL", text));
}
