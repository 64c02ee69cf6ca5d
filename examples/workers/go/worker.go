package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "dynamo-grpc-worker/gen/dynamo_grpc/v1"
)

// worker serves one model. It implements Generate; GenerateOnce, Deliver and Embed answer UNIMPLEMENTED.
type worker struct {
	pb.UnimplementedInferenceServer
	card     *pb.ModelCard
	instance atomic.Pointer[pb.Instance]
	folder   string
	pause    time.Duration
	slots    chan struct{}

	running    sync.WaitGroup
	numRunning atomic.Int32
	isReady    atomic.Bool
	isDraining atomic.Bool
	drained    chan struct{}
	drainOnce  sync.Once
	handedOver context.Context
	handOver   context.CancelFunc
	stops      map[*stoppable]struct{}
	stopsMu    sync.Mutex
}

// stoppable is a request that Control.Stop can end gently.
type stoppable struct {
	id        string
	stop      context.CancelFunc
	isStopped atomic.Bool
}

func newWorker(card *pb.ModelCard, instance *pb.Instance, folder string, pause time.Duration, limit int) *worker {
	handedOver, handOver := context.WithCancel(context.Background())
	w := &worker{
		card: card, folder: folder, pause: pause, slots: make(chan struct{}, limit),
		drained: make(chan struct{}), handedOver: handedOver, handOver: handOver,
		stops: map[*stoppable]struct{}{},
	}
	w.instance.Store(instance)
	return w
}

func (w *worker) startDraining() { w.isDraining.Store(true) }

// Generate streams the answer. The call's own context ends it: a cancel, a deadline, a client that is gone.
func (w *worker) Generate(request *pb.PreprocessedRequest, stream grpc.ServerStreamingServer[pb.GenerateResponse]) error {
	if w.isDraining.Load() {
		return failure(codes.Unavailable, "DRAINING", "", "this worker is draining: try another instance")
	}
	if err := check(request, w.card); err != nil {
		return err
	}
	select {
	case w.slots <- struct{}{}:
		defer func() { <-w.slots }()
	default:
		return overloaded(time.Second)
	}
	w.running.Add(1)
	defer w.running.Done()
	w.numRunning.Add(1)
	defer w.numRunning.Add(-1)

	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(w.handedOver, cancel)()
	own := &stoppable{id: requestID(stream.Context(), request), stop: cancel}
	w.remember(own)
	defer w.forget(own)

	out := &generation{request: request, card: w.card, instance: w.instance.Load()}
	isDone := false
	var sent error
	err := w.ask(ctx, request, func(token uint32) bool {
		var response *pb.GenerateResponse
		response, isDone = out.output(token)
		sent = stream.Send(response)
		return sent == nil && !isDone
	})
	switch {
	case sent != nil || isDone:
		return sent
	case err != nil:
		log.Printf("request %s failed: %v", own.id, err)
		return failure(codes.Internal, "INTERNAL", "", "the model failed: the worker's log says how")
	case stream.Context().Err() != nil: // cancelled, or its time is over
		return stream.Context().Err()
	case w.handedOver.Err() != nil:
		return failure(codes.Unavailable, "ENGINE_SHUTDOWN", "", "this worker leaves: take the request elsewhere")
	}
	reason := pb.FinishReason_FINISH_REASON_STOP
	if own.isStopped.Load() {
		reason = pb.FinishReason_FINISH_REASON_CANCELLED
	}
	return stream.Send(out.last(nil, &pb.FinishInfo{Reason: reason}))
}

// ask runs the model; one that panics has failed, and others go on.
func (w *worker) ask(ctx context.Context, request *pb.PreprocessedRequest, yield func(token uint32) bool) (err error) {
	defer func() {
		if reason := recover(); reason != nil {
			err = fmt.Errorf("panic: %v", reason)
		}
	}()
	return answer(ctx, request, w.pause, yield)
}

// requestID is the caller's id: of the metadata, or else of the message.
func requestID(ctx context.Context, request *pb.PreprocessedRequest) string {
	if ids := metadata.ValueFromIncomingContext(ctx, "x-request-id"); len(ids) > 0 {
		return ids[0]
	}
	return request.RequestId
}

func (w *worker) remember(request *stoppable) {
	w.stopsMu.Lock()
	defer w.stopsMu.Unlock()
	w.stops[request] = struct{}{}
}

func (w *worker) forget(request *stoppable) {
	w.stopsMu.Lock()
	defer w.stopsMu.Unlock()
	delete(w.stops, request)
}

// control tells what the worker serves, and gives the card's files to frontends.
type control struct {
	pb.UnimplementedControlServer
	*worker
}

func (c *control) Describe(context.Context, *pb.DescribeRequest) (*pb.DescribeResponse, error) {
	state := pb.WorkerState_WORKER_STATE_READY
	if !c.isReady.Load() {
		state = pb.WorkerState_WORKER_STATE_STARTING
	}
	if c.isDraining.Load() {
		state = pb.WorkerState_WORKER_STATE_DRAINING
	}
	return &pb.DescribeResponse{
		Instances: []*pb.Instance{c.instance.Load()}, Cards: []*pb.ModelCard{c.card}, State: state,
		NumRequests: uint32(c.numRunning.Load()), MeasuredAt: timestamppb.Now(),
	}, nil
}

func (c *control) GetFile(request *pb.GetFileRequest, stream grpc.ServerStreamingServer[pb.GetFileResponse]) error {
	for _, file := range c.card.Files {
		if file.Sha256 != request.Sha256 {
			continue
		}
		data, err := os.ReadFile(filepath.Join(c.folder, file.Name))
		if err != nil {
			return failure(codes.Internal, "INTERNAL", "", "%s can't be read", file.Name)
		}
		for start := 0; start < len(data); start += 256 << 10 {
			piece := data[start:min(start+256<<10, len(data))]
			if err := stream.Send(&pb.GetFileResponse{Data: piece}); err != nil {
				return err
			}
		}
		return nil
	}
	return failure(codes.NotFound, "FILE_NOT_FOUND", "", "no file with this hash belongs to the model card")
}

func (c *control) Stop(_ context.Context, request *pb.StopRequest) (*pb.StopResponse, error) {
	c.stopsMu.Lock()
	defer c.stopsMu.Unlock()
	found := false
	for running := range c.stops {
		if request.RequestId != "" && running.id == request.RequestId { // without an id it is nobody's to stop
			running.isStopped.Store(true)
			running.stop()
			found = true
		}
	}
	return &pb.StopResponse{Found: found}, nil
}

func (c *control) Drain(context.Context, *pb.DrainRequest) (*pb.DrainResponse, error) {
	c.startDraining()
	c.drainOnce.Do(func() { close(c.drained) })
	return &pb.DrainResponse{NumRequests: uint32(c.numRunning.Load())}, nil
}
