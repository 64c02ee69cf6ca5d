//! Generates the stubs; protox parses the protos, so no protoc is needed.

const PROTOS: &str = "../../../protos";
const PACKAGE: [&str; 4] = [
    "dynamo_grpc/v1/control.proto",
    "dynamo_grpc/v1/endpoint.proto",
    "dynamo_grpc/v1/inference.proto",
    "dynamo_grpc/v1/orca.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={PROTOS}/dynamo_grpc/v1");
    let files = protox::compile(PACKAGE, [PROTOS])?;
    tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    Ok(())
}
