import { Metadata, type ServiceError, status } from "@grpc/grpc-js";

import type { PreprocessedRequest } from "./gen/dynamo_grpc/v1/inference.js";
import type { ModelCard } from "./gen/dynamo_grpc/v1/model_card.js";
import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

const TYPES = "type.googleapis.com/google.rpc.";

/**
 * The status of a call that fails: the reason is what programs read, the field the one that is wrong, and retryS says
 * when to come back.
 */
export function failure(code: status, reason: string, message: string, field = "", retryS = 0): Partial<ServiceError> {
  const domain = "dynamo-grpc";
  const details = [{ typeUrl: `${TYPES}ErrorInfo`, value: ErrorInfo.encode(ErrorInfo.fromPartial({ reason, domain })).finish() }];
  if (field) {
    const bad = BadRequest.fromPartial({ fieldViolations: [{ field, description: message }] });
    details.push({ typeUrl: `${TYPES}BadRequest`, value: BadRequest.encode(bad).finish() });
  }
  if (retryS) {
    const retry = RetryInfo.fromPartial({ retryDelay: { seconds: BigInt(Math.ceil(retryS)) } });
    details.push({ typeUrl: `${TYPES}RetryInfo`, value: RetryInfo.encode(retry).finish() });
  }
  const metadata = new Metadata();
  const packed = Status.encode(Status.fromPartial({ code, message, details })).finish();
  metadata.set("grpc-status-details-bin", Buffer.from(packed));
  return { code, details: message, metadata };
}

const invalid = (field: string, text: string) => failure(status.INVALID_ARGUMENT, "INVALID_REQUEST", text, field);

/** Why the model can't be asked this; undefined if it can. */
export function refusal(request: PreprocessedRequest, card: ModelCard): Partial<ServiceError> | undefined {
  const { model, mdcSum, tokenIds, resume, stopConditions: stop } = request;
  if (model && model !== card.name && !card.aliases.includes(model)) {
    const text = `no model '${model}' at this worker: it serves '${card.name}'`;
    return failure(status.NOT_FOUND, "MODEL_NOT_FOUND", text, "model");
  }
  if (mdcSum !== undefined && mdcSum !== card.checksum) {
    const text = `the request was prepared with model card ${mdcSum}, this worker serves ${card.checksum}`;
    return failure(status.FAILED_PRECONDITION, "CARD_MISMATCH", text);
  }
  const hasText = request.text !== undefined || request.messages.length > 0;
  if (!hasText && !tokenIds.length) {
    return invalid("token_ids", "the prompt is empty: give token_ids");
  }
  if (hasText) {
    return tokenIds.length
      ? invalid("text", "give one prompt, not two")
      : failure(status.UNIMPLEMENTED, "UNSUPPORTED", "this worker takes token_ids, not text", "text");
  }
  const wrong = tokenIds.find((id) => card.vocabSize && id >= card.vocabSize);
  if (wrong !== undefined) {
    return invalid("token_ids", `token id ${wrong}: ids go from 0 to ${card.vocabSize - 1}`);
  }
  if (card.contextLength && tokenIds.length >= card.contextLength) {
    const text = `the prompt has ${tokenIds.length} tokens, and the context holds ${card.contextLength} with the answer`;
    return failure(status.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", text, "token_ids");
  }
  if (resume && !(resume.numPromptTokens > 0 && resume.numPromptTokens <= tokenIds.length)) {
    return invalid("resume", "resume.num_prompt_tokens must be within token_ids");
  }
  if (stop?.maxTokens !== undefined && stop.maxTokens < Math.max(1, stop.minTokens ?? 0)) {
    return invalid("max_tokens", `max_tokens is ${stop.maxTokens}: it must be at least 1, and min_tokens`);
  }
  return outOfRange(request) ?? unable(request, card);
}

function outOfRange({ samplingOptions: options }: PreprocessedRequest): Partial<ServiceError> | undefined {
  const ranges = [
    ["temperature", options?.temperature, 0, 100],
    ["top_p", options?.topP, 0, 1],
    ["min_p", options?.minP, 0, 1],
    ["presence_penalty", options?.presencePenalty, -2, 2],
    ["frequency_penalty", options?.frequencyPenalty, -2, 2],
  ] as const;
  const found = ranges.find(([, value, low, high]) => value !== undefined && !(value >= low && value <= high));
  return found && invalid(found[0], `${found[0]} is ${found[1]}: it must be from ${found[2]} to ${found[3]}`);
}

function unable(request: PreprocessedRequest, card: ModelCard): Partial<ServiceError> | undefined {
  const { samplingOptions: options, outputOptions: output } = request;
  const needed: Record<string, boolean> = {
    n: (options?.n ?? 1) > 1,
    best_of: (options?.bestOf ?? 1) > 1,
    beam_search: options?.useBeamSearch ?? false,
    logprobs: output?.logprobs !== undefined,
    prompt_logprobs: output?.promptLogprobs !== undefined,
    guided_decoding: request.guidedDecoding !== undefined,
    lora: request.loraName !== "",
    media: request.media.length > 0,
    stop: (request.stopConditions?.stop?.length ?? 0) > 0,
    text: output?.text ?? false,
  };
  const missing = Object.keys(needed).find((name) => needed[name] && !card.capabilities.includes(name));
  const text = `this worker does not declare the capability '${missing}'`;
  return missing === undefined ? undefined : failure(status.UNIMPLEMENTED, "UNSUPPORTED", text, missing);
}
