package main

import (
	"context"
	"slices"
	"time"

	pb "dynamo-grpc-worker/gen/dynamo_grpc/v1"
)

// answer yields the tokens of the model's answer, from the first one that isn't there yet (a request that goes on from
// another worker brings those that were generated there), until yield says that it has enough or ctx ends.
// An error is the model's own: its client is told INTERNAL, and the log what it was.
func answer(
	ctx context.Context, request *pb.PreprocessedRequest, pause time.Duration, yield func(token uint32) bool,
) error {
	prompt, given := request.TokenIds, 0
	if request.Resume != nil {
		prompt = request.TokenIds[:request.Resume.NumPromptTokens]
		given = len(request.TokenIds) - len(prompt)
	}
	for _, token := range prompt[min(given, len(prompt)):] {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		if !yield(token) {
			return nil
		}
	}
	return nil
}

// generation turns tokens into outputs: limits, stop ids, finish and usage.
type generation struct {
	request  *pb.PreprocessedRequest
	card     *pb.ModelCard
	instance *pb.Instance
	sequence uint64
	tokens   uint32
}

// output is the next output for a token, and whether it is the last one.
func (g *generation) output(token uint32) (*pb.GenerateResponse, bool) {
	stop := g.request.GetStopConditions()
	mayStop := g.tokens >= stop.GetMinTokens()
	isEnd := !stop.GetIgnoreEos() && slices.Contains(g.eos(), token)
	if mayStop && (isEnd || slices.Contains(stop.GetStopTokenIdsHidden(), token)) {
		return g.last(nil, &pb.FinishInfo{Reason: pb.FinishReason_FINISH_REASON_STOP, Stop: &pb.FinishInfo_StopTokenId{StopTokenId: token}}), true
	}
	g.tokens++
	shown := []uint32{token}
	if g.tokens >= stop.GetMinTokens() && slices.Contains(stop.GetStopTokenIds(), token) {
		return g.last(shown, &pb.FinishInfo{Reason: pb.FinishReason_FINISH_REASON_STOP, Stop: &pb.FinishInfo_StopTokenId{StopTokenId: token}}), true
	}
	if g.tokens == g.maxTokens() {
		return g.last(shown, &pb.FinishInfo{Reason: pb.FinishReason_FINISH_REASON_LENGTH}), true
	}
	return g.next(&pb.ChoiceDelta{TokenIds: shown}), false
}

// last ends choice 0, and tells the usage.
func (g *generation) last(tokens []uint32, finish *pb.FinishInfo) *pb.GenerateResponse {
	response := g.next(&pb.ChoiceDelta{TokenIds: tokens, Finish: finish})
	prompt := uint32(len(g.request.TokenIds))
	if g.request.Resume != nil {
		prompt = g.request.Resume.NumPromptTokens
	}
	carried := uint32(len(g.request.TokenIds)) - prompt
	response.Usage = &pb.Usage{PromptTokens: prompt, CompletionTokens: carried + g.tokens}
	return response
}

func (g *generation) next(delta *pb.ChoiceDelta) *pb.GenerateResponse {
	response := &pb.GenerateResponse{Sequence: g.sequence, Choices: []*pb.ChoiceDelta{delta}}
	if g.sequence == 0 {
		response.Worker = &pb.WorkerInfo{InstanceId: g.instance.InstanceId, Epoch: g.instance.Epoch}
	}
	g.sequence++
	return response
}

func (g *generation) eos() []uint32 {
	if ids := g.request.EosTokenIds; len(ids) > 0 {
		return ids
	}
	return g.card.EosTokenIds
}

func (g *generation) maxTokens() uint32 {
	most := g.card.ContextLength - uint32(len(g.request.TokenIds)) // 0: not known, and no limit
	if g.card.ContextLength == 0 {
		most = 0
	}
	wanted := g.card.DefaultMaxTokens
	if given := g.request.GetStopConditions().GetMaxTokens(); given > 0 {
		wanted = &given
	}
	if wanted != nil && (most == 0 || *wanted < most) {
		return *wanted
	}
	return most
}
