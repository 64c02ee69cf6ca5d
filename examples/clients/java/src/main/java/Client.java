/*
 * A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.
 *
 *     mvn -q -B package
 *     java -jar target/client.jar HOST:PORT [TEXT]
 *
 * HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.
 */

import static java.nio.charset.StandardCharsets.UTF_8;
import static java.util.concurrent.TimeUnit.MILLISECONDS;

import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import dynamogrpc.v1.*;
import dynamogrpc.v1.ControlGrpc.ControlBlockingStub;
import dynamogrpc.v1.InferenceGrpc.InferenceBlockingStub;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.PrintStream;
import java.util.List;
import java.util.Locale;

public final class Client {
    public static void main(String[] args) throws InvalidProtocolBufferException {
        System.setOut(new PrintStream(System.out, true, UTF_8)); // Java's own choice depends on the locale
        ManagedChannel channel = ManagedChannelBuilder.forTarget(args[0]).usePlaintext().build();
        int exitCode = run(channel, args.length > 1 ? args[1] : "");
        channel.shutdownNow();
        System.exit(exitCode);
    }

    private static int run(ManagedChannel channel, String text) throws InvalidProtocolBufferException {
        ControlBlockingStub control = ControlGrpc.newBlockingStub(channel);
        InferenceBlockingStub inference = InferenceGrpc.newBlockingStub(channel);
        try {
            String model = listModels(control);
            stream(inference, ask(model, text, 8));
            cancel(inference, ask(model, text, 4000));
            deadline(inference, ask(model, text, 4000));
        } catch (StatusRuntimeException error) {
            printError(error);
            return 1;
        }
        try {
            inference.generateOnce(ask("no-such-model", text, 1));
        } catch (StatusRuntimeException error) {
            printError(error);
        }
        return 0;
    }

    private static PreprocessedRequest ask(String model, String text, int maxTokens) {
        PreprocessedRequest.Builder request = PreprocessedRequest.newBuilder().setModel(model);
        request.getSamplingOptionsBuilder().setTemperature(0);
        request.getStopConditionsBuilder().setMaxTokens(maxTokens).setIgnoreEos(true);
        if (text.isEmpty()) {
            request.addAllTokenIds(List.of(5, 6, 7));
        } else {
            request.setText(text);
        }
        return request.build();
    }

    private static String listModels(ControlBlockingStub control) {
        List<ModelCard> cards = control.describe(DescribeRequest.getDefaultInstance()).getCardsList();
        System.out.println("models: " + String.join(" ", cards.stream().map(ModelCard::getName).toList()));
        return cards.get(0).getName();
    }

    private static void stream(InferenceBlockingStub inference, PreprocessedRequest request) {
        StringBuilder tokenIds = new StringBuilder(), text = new StringBuilder();
        FinishReason reason = FinishReason.FINISH_REASON_UNSPECIFIED;
        Usage usage = Usage.getDefaultInstance();
        var outputs = inference.generate(request);
        while (outputs.hasNext()) {
            GenerateResponse output = outputs.next();
            for (ChoiceDelta delta : output.getChoicesList()) {
                delta.getTokenIdsList().forEach(id -> tokenIds.append(' ').append(Integer.toUnsignedString(id)));
                text.append(delta.getText());
                if (delta.hasFinish()) {
                    reason = delta.getFinish().getReason();
                }
            }
            if (output.hasUsage()) {
                usage = output.getUsage();
            }
        }
        System.out.println("tokens:" + tokenIds);
        if (!text.isEmpty()) {
            System.out.println("text: " + text);
        }
        System.out.printf("finished: %s, %d prompt tokens, %d generated%n",
                reason, usage.getPromptTokens(), usage.getCompletionTokens());
    }

    private static void cancel(InferenceBlockingStub inference, PreprocessedRequest request) {
        Context.CancellableContext context = Context.current().withCancellation();
        Context before = context.attach(); // a call is cancelled with the context that it was made in
        int numOutputs = 0;
        try {
            var outputs = inference.generate(request);
            while (outputs.hasNext()) {
                outputs.next();
                if (numOutputs < 3 && ++numOutputs == 3) { // one more may have arrived before the cancel
                    context.cancel(null);
                }
            }
        } catch (StatusRuntimeException error) {
            if (error.getStatus().getCode() != Status.Code.CANCELLED) {
                throw error;
            }
            System.out.println("cancelled after " + numOutputs + " outputs: " + error.getStatus().getCode());
        } finally {
            context.detachAndCancel(before, null);
        }
    }

    private static void deadline(InferenceBlockingStub inference, PreprocessedRequest request) {
        try {
            inference.withDeadlineAfter(300, MILLISECONDS).generate(request).forEachRemaining(output -> {});
        } catch (StatusRuntimeException error) {
            if (error.getStatus().getCode() != Status.Code.DEADLINE_EXCEEDED) {
                throw error;
            }
            System.out.println("deadline: " + error.getStatus().getCode());
        }
    }

    /** The status, and of its details the reason, the field that is wrong and when to come back. */
    private static void printError(StatusRuntimeException error) throws InvalidProtocolBufferException {
        com.google.rpc.Status status = StatusProto.fromThrowable(error);
        StringBuilder said = new StringBuilder(error.getStatus().getCode().name());
        for (var detail : status.getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                said.append(" ").append(detail.unpack(ErrorInfo.class).getReason());
            } else if (detail.is(RetryInfo.class)) {
                var delay = detail.unpack(RetryInfo.class).getRetryDelay();
                double seconds = delay.getSeconds() + delay.getNanos() / 1e9;
                said.append(String.format(Locale.ROOT, ", again after %.1f s", seconds));
            } else if (detail.is(BadRequest.class)) {
                said.append(", field ").append(detail.unpack(BadRequest.class).getFieldViolations(0).getField());
            }
        }
        System.out.println("error: " + said + ": " + status.getMessage());
    }
}
