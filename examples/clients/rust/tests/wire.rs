//! The golden wire files, read and written again: an option that is zero, or a field that isn't known, would be lost.

use prost::Message;
use std::fs;

mod v1 {
    #![allow(dead_code)]
    tonic::include_proto!("dynamo_grpc.v1");
}

fn again<M: Message + Default>(data: &[u8]) -> Vec<u8> {
    M::decode(data).expect("it is no such message").encode_to_vec()
}

macro_rules! types {
    ($($name:ident)*) => {
        fn read_and_write(kind: &str, data: &[u8]) -> Vec<u8> {
            match kind {
                $(stringify!($name) => again::<v1::$name>(data),)*
                _ => panic!("{kind} is missing in this test"),
            }
        }
    };
}

types! {
    AudioContent CallRequest CallResponse ChatMessage ChoiceDelta DeliverFrame DeliverRequest
    DeliveredOutput DeliveredTokens DescribeRequest DescribeResponse DrainRequest DrainResponse EmbedInput
    EmbedRequest EmbedResponse Embedding FinishInfo GenerateResponse GetFileRequest GetFileResponse
    GetMetricsRequest GetMetricsResponse GuidedChoice GuidedDecoding ImageContent Instance KvBlock
    KvBlocksRemoved KvBlocksStored KvCacheCleared KvResyncRequired KvSnapshot ListLorasRequest
    ListLorasResponse LoadLoraRequest LoadLoraResponse Logprobs Lora MediaItem MessageContent ModelCard
    ModelFile MultiModalRequest OrcaLoadReport OrcaLoadReportRequest OutputOptions PrefillResult
    PreprocessedRequest PromptInfo RegistryStatus ResumeState RoutingHints RuntimeConfig SamplingOptions
    StopConditions StopRequest StopResponse SubscribeKvEventsRequest SubscribeKvEventsResponse TextContent
    ToolCall ToolCallDelta TopLogprobs UnloadLoraRequest UnloadLoraResponse Usage VideoContent
    WatchLoadRequest WatchLoadResponse WorkerInfo
}

#[test]
fn every_file_is_written_as_it_was_read() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/wire");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some(stem) = name.strip_suffix(".binpb") {
            let data = fs::read(&path).unwrap();
            assert_eq!(read_and_write(stem.split('.').next().unwrap(), &data), data, "{name}");
            count += 1;
        }
    }
    assert!(count > 100, "only {count} files");
}
