//! Generates the stubs; protox parses the protos, so no protoc is needed.

const PROTOS: &str = "../../../protos";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={PROTOS}/dynamo_grpc/v1");
    let files = protox::compile(["dynamo_grpc/v1/control.proto", "dynamo_grpc/v1/inference.proto"], [PROTOS])?;
    tonic_prost_build::configure().build_server(false).compile_fds(files)?;
    Ok(())
}
