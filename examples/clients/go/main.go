// A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.
//
//	buf generate ../../../protos --path ../../../protos/dynamo_grpc/v1
//	go run . HOST:PORT [TEXT]
//
// HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "dynamo-grpc-client/gen/dynamo_grpc/v1"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "which server? give HOST:PORT")
		os.Exit(2)
	}
	channel, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	defer channel.Close()
	text := strings.Join(os.Args[2:], " ")
	if err := run(pb.NewControlClient(channel), pb.NewInferenceClient(channel), text); err != nil {
		printError(err)
		os.Exit(1)
	}
}

func run(control pb.ControlClient, inference pb.InferenceClient, text string) error {
	model, err := listModels(control)
	if err != nil {
		return err
	}
	if err := stream(inference, ask(model, text, 8)); err != nil {
		return err
	}
	if err := cancel(inference, ask(model, text, 4000)); err != nil {
		return err
	}
	if err := deadline(inference, ask(model, text, 4000)); err != nil {
		return err
	}
	if _, err := inference.GenerateOnce(context.Background(), ask("no-such-model", text, 1)); err != nil {
		printError(err)
	}
	return nil
}

func ask(model, text string, maxTokens uint32) *pb.PreprocessedRequest {
	request := &pb.PreprocessedRequest{
		Model:           model,
		SamplingOptions: &pb.SamplingOptions{Temperature: proto.Float32(0)},
		StopConditions:  &pb.StopConditions{MaxTokens: &maxTokens, IgnoreEos: proto.Bool(true)},
	}
	if text != "" {
		request.Text = &text
	} else {
		request.TokenIds = []uint32{5, 6, 7}
	}
	return request
}

func listModels(control pb.ControlClient) (string, error) {
	described, err := control.Describe(context.Background(), &pb.DescribeRequest{})
	if err != nil {
		return "", err
	}
	fmt.Print("models:")
	for _, card := range described.Cards {
		fmt.Print(" ", card.Name)
	}
	fmt.Println()
	return described.Cards[0].Name, nil
}

func stream(inference pb.InferenceClient, request *pb.PreprocessedRequest) error {
	outputs, err := inference.Generate(context.Background(), request)
	if err != nil {
		return err
	}
	var tokens, text strings.Builder
	var reason pb.FinishReason
	var usage *pb.Usage
	for {
		output, err := outputs.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		for _, delta := range output.Choices {
			for _, id := range delta.TokenIds {
				fmt.Fprintf(&tokens, " %d", id)
			}
			text.WriteString(delta.GetText())
			if delta.Finish != nil {
				reason = delta.Finish.Reason
			}
		}
		if output.Usage != nil {
			usage = output.Usage
		}
	}
	fmt.Printf("tokens:%s\n", tokens.String())
	if text.Len() > 0 {
		fmt.Printf("text: %s\n", text.String())
	}
	fmt.Printf("finished: %v, %d prompt tokens, %d generated\n", reason, usage.GetPromptTokens(), usage.GetCompletionTokens())
	return nil
}

func cancel(inference pb.InferenceClient, request *pb.PreprocessedRequest) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	outputs, err := inference.Generate(ctx, request)
	if err != nil {
		return err
	}
	for range 3 {
		if _, err := outputs.Recv(); errors.Is(err, io.EOF) {
			return nil // it was over before
		} else if err != nil {
			return err
		}
	}
	stop()
	for err == nil { // what has arrived already is still given
		_, err = outputs.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	if status.Code(err) != codes.Canceled {
		return err
	}
	fmt.Println("cancelled after 3 outputs: CANCELLED")
	return nil
}

func deadline(inference pb.InferenceClient, request *pb.PreprocessedRequest) error {
	ctx, stop := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer stop()
	outputs, err := inference.Generate(ctx, request)
	for err == nil {
		_, err = outputs.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	if status.Code(err) != codes.DeadlineExceeded {
		return err
	}
	fmt.Println("deadline: DEADLINE_EXCEEDED")
	return nil
}

// printError tells the status, and of its details the reason, the field that is wrong and when to come back.
func printError(err error) {
	failed := status.Convert(err)
	said := codeName(failed.Code())
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			said += " " + detail.Reason
		case *errdetails.RetryInfo:
			said += fmt.Sprintf(", again after %.1f s", detail.RetryDelay.AsDuration().Seconds())
		case *errdetails.BadRequest:
			said += ", field " + detail.FieldViolations[0].Field
		}
	}
	fmt.Printf("error: %s: %s\n", said, failed.Message())
}

// codeName is the name that gRPC's specification gives a code: NOT_FOUND where Go says NotFound.
func codeName(code codes.Code) string {
	var name strings.Builder
	for at, letter := range code.String() {
		if at > 0 && letter >= 'A' && letter <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(letter)
	}
	return strings.ToUpper(name.String())
}
