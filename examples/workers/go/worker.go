package main

import (
	"context"
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
	instance *pb.Instance
	folder   string
	pause    time.Duration
	slots    chan struct{}

	running     sync.WaitGroup
	numRunning  atomic.Int32
	isDraining  atomic.Bool
	drained     chan struct{}
	drainOnce   sync.Once
	handedOver  context.Context
	handOver    context.CancelFunc
	stopsByID   map[string]context.CancelFunc
	stopsByIDMu sync.Mutex
}

func newWorker(card *pb.ModelCard, instance *pb.Instance, folder string, pause time.Duration, limit int) *worker {
	handedOver, handOver := context.WithCancel(context.Background())
	return &worker{
		card: card, instance: instance, folder: folder, pause: pause, slots: make(chan struct{}, limit),
		drained: make(chan struct{}), handedOver: handedOver, handOver: handOver,
		stopsByID: map[string]context.CancelFunc{},
	}
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

	id := requestID(stream.Context(), request)
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(w.handedOver, cancel)()
	stopped := w.stoppable(id, cancel)
	defer w.forget(id)

	out := &generation{request: request, card: w.card, instance: w.instance}
	isDone := false
	var err error
	answer(ctx, request, w.pause, func(token uint32) bool {
		var response *pb.GenerateResponse
		response, isDone = out.output(token)
		err = stream.Send(response)
		return err == nil && !isDone
	})
	switch {
	case err != nil || isDone:
		return err
	case stream.Context().Err() != nil: // cancelled, or its time is over
		return stream.Context().Err()
	case w.handedOver.Err() != nil:
		return failure(codes.Unavailable, "ENGINE_SHUTDOWN", "", "this worker leaves: take the request elsewhere")
	}
	reason := pb.FinishReason_FINISH_REASON_STOP
	if stopped() {
		reason = pb.FinishReason_FINISH_REASON_CANCELLED
	}
	return stream.Send(out.last(nil, &pb.FinishInfo{Reason: reason}))
}

// requestID is the caller's id: of the metadata, or else of the message.
func requestID(ctx context.Context, request *pb.PreprocessedRequest) string {
	if ids := metadata.ValueFromIncomingContext(ctx, "x-request-id"); len(ids) > 0 {
		return ids[0]
	}
	return request.RequestId
}

// stoppable lets Control.Stop end a request gently; the result says whether it did.
func (w *worker) stoppable(id string, cancel context.CancelFunc) func() bool {
	var isStopped atomic.Bool
	w.stopsByIDMu.Lock()
	defer w.stopsByIDMu.Unlock()
	w.stopsByID[id] = func() { isStopped.Store(true); cancel() }
	return isStopped.Load
}

func (w *worker) forget(id string) {
	w.stopsByIDMu.Lock()
	defer w.stopsByIDMu.Unlock()
	delete(w.stopsByID, id)
}

// control tells what the worker serves, and gives the card's files to frontends.
type control struct {
	pb.UnimplementedControlServer
	*worker
}

func (c *control) Describe(context.Context, *pb.DescribeRequest) (*pb.DescribeResponse, error) {
	state := pb.WorkerState_WORKER_STATE_READY
	if c.isDraining.Load() {
		state = pb.WorkerState_WORKER_STATE_DRAINING
	}
	return &pb.DescribeResponse{
		Instances: []*pb.Instance{c.instance}, Cards: []*pb.ModelCard{c.card}, State: state,
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
	c.stopsByIDMu.Lock()
	defer c.stopsByIDMu.Unlock()
	stop, found := c.stopsByID[request.RequestId]
	if found {
		stop()
	}
	return &pb.StopResponse{Found: found}, nil
}

func (c *control) Drain(context.Context, *pb.DrainRequest) (*pb.DrainResponse, error) {
	c.startDraining()
	c.drainOnce.Do(func() { close(c.drained) })
	return &pb.DrainResponse{NumRequests: uint32(c.numRunning.Load())}, nil
}
