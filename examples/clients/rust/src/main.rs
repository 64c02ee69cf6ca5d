//! A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.
//!
//!     cargo build --release
//!     target/release/client HOST:PORT [TEXT]
//!
//! HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetail, StatusExt};
use v1::control_client::ControlClient;
use v1::inference_client::InferenceClient;
use v1::{DescribeRequest, FinishReason, PreprocessedRequest, SamplingOptions, StopConditions, Usage};

#[allow(dead_code)] // the contract is larger than this program
mod v1 {
    tonic::include_proto!("dynamo_grpc.v1");
}

type Inference = InferenceClient<Channel>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let address = env::args().nth(1).ok_or("usage: client HOST:PORT [TEXT]")?;
    let text = env::args().nth(2).unwrap_or_default();
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    let mut control = ControlClient::new(channel.clone());
    let mut inference = InferenceClient::new(channel);
    let done: Result<(), Status> = async {
        let model = list_models(&mut control).await?;
        stream(&mut inference, ask(&model, &text, 8)).await?;
        cancel(&mut inference, ask(&model, &text, 4000)).await?;
        deadline(&mut inference, ask(&model, &text, 4000)).await
    }
    .await;
    if let Err(error) = done {
        print_error(&error);
        return Ok(ExitCode::FAILURE);
    }
    if let Err(error) = inference.generate_once(ask("no-such-model", &text, 1)).await {
        print_error(&error);
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(model: &str, text: &str, max_tokens: u32) -> PreprocessedRequest {
    let sampling_options = SamplingOptions { temperature: Some(0.0), ..Default::default() };
    let stop_conditions = StopConditions { max_tokens: Some(max_tokens), ignore_eos: Some(true), ..Default::default() };
    let (token_ids, text) = if text.is_empty() { (vec![5, 6, 7], None) } else { (vec![], Some(text.to_owned())) };
    PreprocessedRequest {
        model: model.to_owned(),
        sampling_options: Some(sampling_options),
        stop_conditions: Some(stop_conditions),
        token_ids,
        text,
        ..Default::default()
    }
}

async fn list_models(control: &mut ControlClient<Channel>) -> Result<String, Status> {
    let cards = control.describe(DescribeRequest {}).await?.into_inner().cards;
    let names: Vec<_> = cards.iter().map(|card| card.name.as_str()).collect();
    println!("models: {}", names.join(" "));
    Ok(names[0].to_owned())
}

async fn stream(inference: &mut Inference, request: PreprocessedRequest) -> Result<(), Status> {
    let (mut token_ids, mut text) = (String::new(), String::new());
    let (mut reason, mut usage) = (FinishReason::Unspecified, Usage::default());
    let mut outputs = inference.generate(request).await?.into_inner();
    while let Some(output) = outputs.message().await? {
        for delta in &output.choices {
            token_ids.extend(delta.token_ids.iter().map(|id| format!(" {id}")));
            text += delta.text();
            if let Some(finish) = &delta.finish {
                reason = finish.reason();
            }
        }
        usage = output.usage.unwrap_or(usage);
    }
    println!("tokens:{token_ids}");
    if !text.is_empty() {
        println!("text: {text}");
    }
    let (prompt, generated) = (usage.prompt_tokens, usage.completion_tokens);
    println!("finished: {}, {prompt} prompt tokens, {generated} generated", reason.as_str_name());
    Ok(())
}

async fn cancel(inference: &mut Inference, request: PreprocessedRequest) -> Result<(), Status> {
    let mut outputs = inference.generate(request).await?.into_inner();
    for _ in 0..3 {
        if outputs.message().await?.is_none() {
            return Ok(());
        }
    }
    drop(outputs); // this is the cancel; nobody is left whom its status could be told
    println!("cancelled after 3 outputs: {}", name(Code::Cancelled));
    Ok(())
}

async fn deadline(inference: &mut Inference, request: PreprocessedRequest) -> Result<(), Status> {
    let limit = Duration::from_millis(300);
    let mut request = Request::new(request);
    request.set_timeout(limit); // for the server: tonic itself watches only the first output, and says CANCELLED then
    let read_all = async {
        let mut outputs = inference.generate(request).await?.into_inner();
        while outputs.message().await?.is_some() {}
        Ok(())
    };
    let ended = tokio::select! {
        biased; // so that a limit reached here wins over tonic's
        _ = tokio::time::sleep(limit) => Err(Status::deadline_exceeded("")),
        ended = read_all => ended,
    };
    match ended {
        Err(error) if error.code() == Code::DeadlineExceeded => println!("deadline: {}", name(error.code())),
        ended => return ended,
    }
    Ok(())
}

/// The status, and of its details the reason, the field that is wrong and when to come back.
fn print_error(error: &Status) {
    let mut said = name(error.code());
    for detail in error.get_error_details_vec() {
        match detail {
            ErrorDetail::ErrorInfo(info) => said += &format!(" {}", info.reason),
            ErrorDetail::RetryInfo(retry) => {
                said += &format!(", again after {:.1} s", retry.retry_delay.unwrap_or_default().as_secs_f64())
            }
            ErrorDetail::BadRequest(bad) => said += &format!(", field {}", bad.field_violations[0].field),
            _ => {}
        }
    }
    println!("error: {said}: {}", error.message());
}

/// A code by the name that gRPC has for it, NOT_FOUND; tonic's own is NotFound.
fn name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
