package main

import (
	"context"
	"fmt"
	"log"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	clientv3 "go.etcd.io/etcd/client/v3"

	pb "dynamo-grpc-worker/gen/dynamo_grpc/v1"
)

const leaseSeconds = 10

// keepRegistered puts instance and card into etcd under a lease, and again in a new epoch when the lease was lost,
// until leave is closed; then it takes them away. registered is closed when they are there for the first time.
func keepRegistered(endpoints []string, worker *worker, registered, leave chan struct{}) error {
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second})
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for first := true; ; {
		lease, kept, err := register(ctx, client, worker.instance.Load(), worker.card)
		if err != nil {
			log.Print("not registered: ", err)
		} else {
			if first {
				close(registered)
			}
			first = false
			if isLeaving(kept, leave) {
				limited, cancel := context.WithTimeout(ctx, 2*time.Second)
				defer cancel()
				_, err := client.Revoke(limited, lease) // its keys go at once
				return err
			}
			log.Print("the lease was lost: registering again")
			again := proto.CloneOf(worker.instance.Load())
			again.Epoch++
			again.RegisteredAt = timestamppb.Now()
			worker.instance.Store(again)
		}
		select {
		case <-leave:
			return nil
		case <-time.After(time.Second):
		}
	}
}

func register(
	ctx context.Context, client *clientv3.Client, instance *pb.Instance, card *pb.ModelCard,
) (clientv3.LeaseID, <-chan *clientv3.LeaseKeepAliveResponse, error) {
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lease, err := client.Grant(limited, leaseSeconds)
	if err != nil {
		return 0, nil, err
	}
	rest := fmt.Sprintf("%s/%s/%s/%016x", instance.Namespace, instance.Component, instance.Endpoint, instance.InstanceId)
	put := func(folder string, value proto.Message) clientv3.Op {
		text, _ := protojson.MarshalOptions{UseProtoNames: true}.Marshal(value)
		return clientv3.OpPut("/dynamo_grpc/v1/"+folder+"/"+rest, string(text), clientv3.WithLease(lease.ID))
	}
	if _, err := client.Txn(limited).Then(put("instances", instance), put("models", card)).Commit(); err != nil {
		return 0, nil, err
	}
	kept, err := client.KeepAlive(ctx, lease.ID)
	return lease.ID, kept, err
}

// isLeaving waits until the lease is lost (false) or leave is closed (true).
func isLeaving(kept <-chan *clientv3.LeaseKeepAliveResponse, leave chan struct{}) bool {
	for {
		select {
		case _, ok := <-kept:
			if !ok {
				return false
			}
		case <-leave:
			return true
		}
	}
}
