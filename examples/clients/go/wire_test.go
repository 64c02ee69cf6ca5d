package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// The golden wire files say in Go what they say in Python.
func TestWire(t *testing.T) {
	folder := "../../../tests/wire"
	text, err := os.ReadFile(filepath.Join(folder, "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	var expected map[string]any
	if err := json.Unmarshal(text, &expected); err != nil {
		t.Fatal(err)
	}
	if len(expected) < 100 {
		t.Fatalf("only %d files", len(expected))
	}
	for name, wanted := range expected {
		kind, _, _ := strings.Cut(name, ".")
		found, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("dynamo_grpc.v1." + kind))
		if err != nil {
			t.Fatal(name, err)
		}
		data, err := os.ReadFile(filepath.Join(folder, name+".binpb"))
		if err != nil {
			t.Fatal(err)
		}
		message := found.New().Interface()
		if err := proto.Unmarshal(data, message); err != nil {
			t.Fatal(name, err)
		}
		said, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
		if err != nil {
			t.Fatal(name, err)
		}
		var got any
		if err := json.Unmarshal(said, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, wanted) {
			t.Errorf("%s says\n%v, not\n%v", name, got, wanted)
		}
		again, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
		if err != nil || len(again) != len(data) {
			t.Errorf("%s has %d bytes when it is written again, not %d (%v)", name, len(again), len(data), err)
		}
	}
}
