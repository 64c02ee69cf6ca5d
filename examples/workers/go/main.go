// A worker in Go: it streams the tokens of its prompt back, one at a time.
//
//	dynamo-grpc card MODEL_FOLDER --name echo > card.json
//	buf generate ../../../protos --path ../../../protos/dynamo_grpc/v1
//	go run . -card card.json -files MODEL_FOLDER
//
// It registers in etcd under a lease (ETCD_ENDPOINTS), serves Generate, answers health checks, obeys cancels, deadlines
// and SIGTERM. answer.go is what another model would replace.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "dynamo-grpc-worker/gen/dynamo_grpc/v1"
)

var (
	address   = flag.String("address", "127.0.0.1:0", "address to listen on")
	advertise = flag.String("advertise", "", "address to register, where others reach it by another one")
	cardPath  = flag.String("card", "card.json", "the model card, as `dynamo-grpc card` prints it")
	folder    = flag.String("files", ".", "the model folder, with the card's files")
	pause     = flag.Duration("pause", 5*time.Millisecond, "time that a token takes")
	limit     = flag.Int("max-concurrent", 64, "requests at once; others are refused")
	grace     = flag.Duration("grace", 30*time.Second, "how long running requests may take after SIGTERM")
)

func main() {
	flag.Parse()
	card, err := readCard(*cardPath)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	if err := checkFiles(card, *folder); err != nil {
		log.Fatal(err)
	}
	instance := &pb.Instance{
		Namespace: "dynamo", Component: "backend", Endpoint: "generate",
		InstanceId: rand.Uint64(), Address: cmpOr(*advertise, listener.Addr().String()), Epoch: 1,
		Kind: pb.EndpointKind_ENDPOINT_KIND_MODEL, Model: card.Name, CardChecksum: card.Checksum,
		RegisteredAt: timestamppb.Now(),
	}
	worker := newWorker(card, instance, *folder, *pause, *limit)
	// frontends ask every 10 s whether the connection lives, also while nothing runs; the default would end it for that
	server := grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.MaxRecvMsgSize(64<<20),
	)
	states := health.NewServer()
	services := []string{"", pb.Inference_ServiceDesc.ServiceName, "model/" + card.Name}
	for _, service := range services {
		states.SetServingStatus(service, healthpb.HealthCheckResponse_NOT_SERVING)
	}
	pb.RegisterInferenceServer(server, worker)
	pb.RegisterControlServer(server, &control{worker: worker})
	healthpb.RegisterHealthServer(server, states)
	reflection.Register(server)
	go server.Serve(listener)

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	registered := make(chan struct{})
	leave := make(chan struct{})
	left := make(chan error, 1)
	endpoints := strings.Split(cmpOr(os.Getenv("ETCD_ENDPOINTS"), "localhost:2379"), ",")
	go func() { left <- keepRegistered(endpoints, worker, registered, leave) }()
	select {
	case <-registered:
	case err := <-left:
		log.Fatal(err)
	case <-ctx.Done():
		return
	}
	worker.isReady.Store(true)
	for _, service := range services {
		states.SetServingStatus(service, healthpb.HealthCheckResponse_SERVING)
	}
	fmt.Printf("worker ready at %s (model %s, instance %016x)\n", instance.Address, card.Name, instance.InstanceId)

	select {
	case <-ctx.Done():
	case <-worker.drained: // Control.Drain
	}
	stop()            // a second signal ends it at once
	states.Shutdown() // NOT_SERVING from here on
	worker.startDraining()
	close(leave) // nobody finds it any more
	if err := <-left; err != nil {
		log.Print("leaving the registry: ", err)
	}
	done := make(chan struct{})
	go func() { worker.running.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(*grace):
		log.Printf("requests still run after %v and are handed over", *grace)
		worker.handOver()
	}
	// what was sent last must arrive, its status too; but nobody waits for a client that doesn't read
	time.AfterFunc(2*time.Second, server.Stop)
	server.GracefulStop()
}

// checkFiles looks for the card's files before a frontend asks for them.
func checkFiles(card *pb.ModelCard, folder string) error {
	for _, file := range card.Files {
		if _, err := os.Stat(filepath.Join(folder, file.Name)); err != nil {
			return fmt.Errorf("the card's files are missing in -files %s: %w", folder, err)
		}
	}
	return nil
}

func readCard(path string) (*pb.ModelCard, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	card := &pb.ModelCard{}
	if err := protojson.Unmarshal(data, card); err != nil {
		return nil, fmt.Errorf("%s is no model card: %w", path, err)
	}
	return card, nil
}

func cmpOr(text, other string) string {
	if text == "" {
		return other
	}
	return text
}
