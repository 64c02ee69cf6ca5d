import { setTimeout as sleep } from "node:timers/promises";

import {
  type ChoiceDelta,
  type FinishInfo,
  FinishReason,
  GenerateResponse,
  type PreprocessedRequest,
} from "./gen/dynamo_grpc/v1/inference.js";
import type { Instance, ModelCard } from "./gen/dynamo_grpc/v1/model_card.js";

/**
 * The tokens of the model's answer, from the first one that isn't there yet: a request that goes on from another worker
 * brings those that were generated there.
 */
export async function* answer(request: PreprocessedRequest, pauseMs: number, signal: AbortSignal): AsyncGenerator<number> {
  const numPrompt = request.resume?.numPromptTokens ?? request.tokenIds.length;
  for (const token of request.tokenIds.slice(request.tokenIds.length - numPrompt, numPrompt)) {
    await sleep(pauseMs, undefined, { signal }).catch(() => {}); // an abort ends it early
    if (signal.aborted) {
      return;
    }
    yield token;
  }
}

/** Turns tokens into outputs: limits, stop ids, finish and usage. */
export class Generation {
  private sequence = 0n;
  private numTokens = 0;

  constructor(
    private readonly request: PreprocessedRequest,
    private readonly card: ModelCard,
    private readonly instance: Instance,
  ) {}

  /** The next output for a token, and whether it is the last one. */
  output(token: number): [GenerateResponse, boolean] {
    const stop = this.request.stopConditions;
    const minTokens = stop?.minTokens ?? 0;
    const eos = this.request.eosTokenIds.length ? this.request.eosTokenIds : this.card.eosTokenIds;
    const isHidden = stop?.stopTokenIdsHidden?.includes(token) || (!stop?.ignoreEos && eos.includes(token));
    const stopped = { reason: FinishReason.FINISH_REASON_STOP, stopTokenId: token };
    if (isHidden && this.numTokens >= minTokens) {
      return [this.last([], stopped), true];
    }
    this.numTokens++;
    if (stop?.stopTokenIds?.includes(token) && this.numTokens >= minTokens) {
      return [this.last([token], stopped), true];
    }
    if (this.numTokens === this.maxTokens) {
      return [this.last([token], { reason: FinishReason.FINISH_REASON_LENGTH }), true];
    }
    return [this.next({ tokenIds: [token] }), false];
  }

  /** The end of choice 0, with the usage. */
  last(tokenIds: number[], finish: Partial<FinishInfo>): GenerateResponse {
    const promptTokens = this.request.resume?.numPromptTokens ?? this.request.tokenIds.length;
    const carried = this.request.tokenIds.length - promptTokens;
    const response = this.next({ tokenIds, finish: { reason: FinishReason.FINISH_REASON_STOP, ...finish } });
    return { ...response, usage: { promptTokens, completionTokens: carried + this.numTokens } };
  }

  private next(delta: Partial<ChoiceDelta>): GenerateResponse {
    const { instanceId, epoch } = this.instance;
    const worker = this.sequence === 0n ? { instanceId, epoch } : undefined;
    return GenerateResponse.fromPartial({ sequence: this.sequence++, choices: [delta], worker });
  }

  private get maxTokens(): number {
    const { contextLength, defaultMaxTokens } = this.card;
    const room = contextLength ? contextLength - this.request.tokenIds.length : Infinity;
    return Math.min(this.request.stopConditions?.maxTokens ?? defaultMaxTokens ?? Infinity, room);
  }
}
