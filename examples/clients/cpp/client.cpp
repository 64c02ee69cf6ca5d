// A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.
//
//     apt-get install libgrpc++-dev protobuf-compiler-grpc
//     cmake -S . -B build && cmake --build build
//     build/client HOST:PORT [TEXT]
//
// HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.

#include <absl/status/status.h>
#include <google/protobuf/util/time_util.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>

#include "dynamo_grpc/v1/control.grpc.pb.h"
#include "dynamo_grpc/v1/inference.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace v1 = dynamo_grpc::v1;

v1::PreprocessedRequest ask(const std::string& model, const std::string& text, unsigned max_tokens);
grpc::Status list_models(v1::Control::Stub& control, std::string& model);
grpc::Status stream(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request);
grpc::Status cancel(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request);
grpc::Status deadline(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request);
void print_error(const grpc::Status& status);
std::string name(grpc::StatusCode code);

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: client HOST:PORT [TEXT]\n";
    return 1;
  }
  const std::string text = argc > 2 ? argv[2] : "";
  const auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  const auto control = v1::Control::NewStub(channel);
  const auto inference = v1::Inference::NewStub(channel);
  std::string model;
  grpc::Status status = list_models(*control, model);
  if (status.ok()) status = stream(*inference, ask(model, text, 8));
  if (status.ok()) status = cancel(*inference, ask(model, text, 4000));
  if (status.ok()) status = deadline(*inference, ask(model, text, 4000));
  if (!status.ok()) {
    print_error(status);
    return 1;
  }
  grpc::ClientContext context;
  v1::GenerateResponse response;
  status = inference->GenerateOnce(&context, ask("no-such-model", text, 1), &response);
  if (!status.ok()) print_error(status);
  return 0;
}

v1::PreprocessedRequest ask(const std::string& model, const std::string& text, unsigned max_tokens) {
  v1::PreprocessedRequest request;
  request.set_model(model);
  request.mutable_sampling_options()->set_temperature(0);
  request.mutable_stop_conditions()->set_max_tokens(max_tokens);
  request.mutable_stop_conditions()->set_ignore_eos(true);
  if (text.empty()) {
    for (unsigned id : {5, 6, 7}) request.add_token_ids(id);
  } else {
    request.set_text(text);
  }
  return request;
}

grpc::Status list_models(v1::Control::Stub& control, std::string& model) {
  grpc::ClientContext context;
  v1::DescribeResponse described;
  if (const auto status = control.Describe(&context, {}, &described); !status.ok()) return status;
  std::cout << "models:";
  for (const auto& card : described.cards()) std::cout << ' ' << card.name();
  std::cout << "\n";
  model = described.cards(0).name();
  return grpc::Status::OK;
}

grpc::Status stream(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request) {
  grpc::ClientContext context;
  const auto reader = inference.Generate(&context, request);
  std::ostringstream token_ids, text;
  v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED;
  v1::Usage usage;
  for (v1::GenerateResponse output; reader->Read(&output);) {
    for (const auto& delta : output.choices()) {
      for (auto id : delta.token_ids()) token_ids << ' ' << id;
      text << delta.text();
      if (delta.has_finish()) reason = delta.finish().reason();
    }
    if (output.has_usage()) usage = output.usage();
  }
  if (const auto status = reader->Finish(); !status.ok()) return status;
  std::cout << "tokens:" << token_ids.str() << "\n";
  if (!text.str().empty()) std::cout << "text: " << text.str() << "\n";
  std::cout << "finished: " << v1::FinishReason_Name(reason) << ", " << usage.prompt_tokens() << " prompt tokens, "
            << usage.completion_tokens() << " generated\n";
  return grpc::Status::OK;
}

grpc::Status cancel(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request) {
  grpc::ClientContext context;
  const auto reader = inference.Generate(&context, request);
  int num_outputs = 0;
  for (v1::GenerateResponse output; reader->Read(&output);) {  // also what came in before the cancel
    if (num_outputs < 3 && ++num_outputs == 3) context.TryCancel();
  }
  const grpc::Status status = reader->Finish();
  if (status.error_code() != grpc::StatusCode::CANCELLED) return status;
  std::cout << "cancelled after " << num_outputs << " outputs: " << name(status.error_code()) << "\n";
  return grpc::Status::OK;
}

grpc::Status deadline(v1::Inference::Stub& inference, const v1::PreprocessedRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  const auto reader = inference.Generate(&context, request);
  for (v1::GenerateResponse output; reader->Read(&output);) {
  }
  const grpc::Status status = reader->Finish();
  if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) return status;
  std::cout << "deadline: " << name(status.error_code()) << "\n";
  return grpc::Status::OK;
}

// The status, and of its details the reason, the field that is wrong and when to come back.
void print_error(const grpc::Status& status) {
  std::cout << "error: " << name(status.error_code());
  google::rpc::Status packed;
  packed.ParseFromString(status.error_details());
  for (const auto& detail : packed.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::RetryInfo retry;
    google::rpc::BadRequest bad;
    if (detail.UnpackTo(&info)) {
      std::cout << ' ' << info.reason();
    } else if (detail.UnpackTo(&retry)) {
      const auto ms = google::protobuf::util::TimeUtil::DurationToMilliseconds(retry.retry_delay());
      std::cout << ", again after " << std::fixed << std::setprecision(1) << ms / 1000.0 << " s";
    } else if (detail.UnpackTo(&bad)) {
      std::cout << ", field " << bad.field_violations(0).field();
    }
  }
  std::cout << ": " << status.error_message() << "\n";
}

// grpc::StatusCode has no names of its own; absl's codes are the same.
std::string name(grpc::StatusCode code) { return absl::StatusCodeToString(static_cast<absl::StatusCode>(code)); }
