// A client that spreads its requests over several servers by their load: gRPC's own weighted_round_robin reads the
// report (ORCA) that each answer ends with. Nothing but the balancer's configuration is needed.
//
//	go run ./balanced HOST:PORT,HOST:PORT[,…] [REQUESTS]
package main

import (
	"context"
	"fmt"
	"log"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	pb "dynamo-grpc-client/gen/dynamo_grpc/v1"
)

const balancing = `{"loadBalancingConfig": [{"weighted_round_robin": {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s"}}]}`

func main() {
	if len(os.Args) < 2 {
		log.Fatal("which servers? give HOST:PORT,HOST:PORT")
	}
	count := 100
	if len(os.Args) > 2 {
		count, _ = strconv.Atoi(os.Args[2])
	}
	// where servers have a name in DNS, "dns:///name:port" takes this resolver's place
	servers := manual.NewBuilderWithScheme("list")
	var addresses []resolver.Address
	for _, address := range strings.Split(os.Args[1], ",") {
		addresses = append(addresses, resolver.Address{Addr: address})
	}
	servers.InitialState(resolver.State{Addresses: addresses})
	channel, err := grpc.NewClient("list:///workers", grpc.WithResolvers(servers),
		grpc.WithDefaultServiceConfig(balancing), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer channel.Close()
	inference, counts := pb.NewInferenceClient(channel), map[string]int{}
	one := uint32(1)
	for range count {
		var from peer.Peer
		request := &pb.PreprocessedRequest{TokenIds: []uint32{5, 6, 7}, StopConditions: &pb.StopConditions{MaxTokens: &one}}
		if _, err := inference.GenerateOnce(context.Background(), request, grpc.Peer(&from)); err != nil {
			log.Fatal(err)
		}
		counts[from.Addr.String()]++
	}
	for _, address := range slices.Sorted(maps.Keys(counts)) {
		fmt.Println(address, counts[address])
	}
}
