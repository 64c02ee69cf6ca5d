package main

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "dynamo-grpc-worker/gen/dynamo_grpc/v1"
)

// failure is the status of a call that fails: the reason is what programs read, the field the one that is wrong.
func failure(code codes.Code, reason, field, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: "dynamo-grpc"}}
	if field != "" {
		violation := &errdetails.BadRequest_FieldViolation{Field: field, Description: text}
		details = append(details, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{violation}})
	}
	return withDetails(status.New(code, text), details...)
}

// overloaded is the refusal of a full worker: it says when to come back.
func overloaded(retry time.Duration) error {
	return withDetails(
		status.New(codes.ResourceExhausted, "this worker is full"),
		&errdetails.ErrorInfo{Reason: "OVERLOADED", Domain: "dynamo-grpc"},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(retry)},
	)
}

func withDetails(plain *status.Status, details ...protoadapt.MessageV1) error {
	if full, err := plain.WithDetails(details...); err == nil {
		return full.Err()
	}
	return plain.Err()
}

// check refuses what the model can't be asked.
func check(request *pb.PreprocessedRequest, card *pb.ModelCard) error {
	invalid := func(field, format string, args ...any) error {
		return failure(codes.InvalidArgument, "INVALID_REQUEST", field, format, args...)
	}
	if request.Model != "" && request.Model != card.Name && !slices.Contains(card.Aliases, request.Model) {
		return failure(codes.NotFound, "MODEL_NOT_FOUND", "model", "no model %q at this worker: it serves %q", request.Model, card.Name)
	}
	if request.MdcSum != nil && *request.MdcSum != card.Checksum {
		return failure(codes.FailedPrecondition, "CARD_MISMATCH", "", "the request was prepared with model card %s, this worker serves %s", *request.MdcSum, card.Checksum)
	}
	hasText := request.Text != nil || len(request.Messages) > 0
	switch {
	case len(request.TokenIds) == 0 && !hasText:
		return invalid("token_ids", "the prompt is empty: give token_ids")
	case len(request.TokenIds) > 0 && hasText:
		return invalid("text", "give one prompt, not two")
	case hasText:
		return failure(codes.Unimplemented, "UNSUPPORTED", "text", "this worker takes token_ids, not text")
	}
	if highest := slices.Max(request.TokenIds); card.VocabSize > 0 && highest >= card.VocabSize {
		return invalid("token_ids", "token id %d: ids go from 0 to %d", highest, card.VocabSize-1)
	}
	if length := len(request.TokenIds); card.ContextLength > 0 && length >= int(card.ContextLength) {
		return failure(codes.InvalidArgument, "CONTEXT_LENGTH_EXCEEDED", "token_ids", "the prompt has %d tokens, and the context holds %d with the answer", length, card.ContextLength)
	}
	if resume := request.Resume; resume != nil && (resume.NumPromptTokens == 0 || int(resume.NumPromptTokens) > len(request.TokenIds)) {
		return invalid("resume", "resume.num_prompt_tokens must be within token_ids")
	}
	stop := request.GetStopConditions()
	if stop != nil && stop.MaxTokens != nil && *stop.MaxTokens < max(1, stop.GetMinTokens()) {
		return invalid("max_tokens", "max_tokens is %d: it must be at least 1, and min_tokens", *stop.MaxTokens)
	}
	return checkOptions(request, card, invalid)
}

func checkOptions(request *pb.PreprocessedRequest, card *pb.ModelCard, invalid func(field, format string, args ...any) error) error {
	options, stop, output := request.GetSamplingOptions(), request.GetStopConditions(), request.GetOutputOptions()
	if options == nil {
		options = &pb.SamplingOptions{} // all of the model's own
	}
	for _, option := range []struct {
		name      string
		value     *float32
		low, high float32
	}{
		{"temperature", options.Temperature, 0, 100},
		{"top_p", options.TopP, 0, 1},
		{"min_p", options.MinP, 0, 1},
		{"presence_penalty", options.PresencePenalty, -2, 2},
		{"frequency_penalty", options.FrequencyPenalty, -2, 2},
	} {
		if option.value != nil && !(option.low <= *option.value && *option.value <= option.high) {
			return invalid(option.name, "%s is %g: it must be from %g to %g", option.name, *option.value, option.low, option.high)
		}
	}
	for _, need := range []struct {
		capability string
		isNeeded   bool
	}{
		{"n", options.GetN() > 1},
		{"best_of", options.GetBestOf() > 1},
		{"beam_search", options.GetUseBeamSearch()},
		{"logprobs", output != nil && output.Logprobs != nil},
		{"prompt_logprobs", output != nil && output.PromptLogprobs != nil},
		{"guided_decoding", request.GuidedDecoding != nil},
		{"lora", request.LoraName != ""},
		{"media", len(request.Media) > 0},
		{"stop", len(stop.GetStop()) > 0},
		{"text", output.GetText()},
	} {
		if need.isNeeded && !slices.Contains(card.Capabilities, need.capability) {
			return failure(codes.Unimplemented, "UNSUPPORTED", need.capability, "this worker does not declare the capability %q", need.capability)
		}
	}
	return nil
}
