"""A model's worker: it takes text, and says it louder."""

from dynamo_grpc import ModelInput, Worker, prompt_text, run


class Shout(Worker):
    model_name = "shout"
    model_input = ModelInput.Text  # text and messages; without it, generate gets token ids

    async def generate(self, request, context):
        for word in prompt_text(request).split():
            yield word.upper() + " "


if __name__ == "__main__":
    run(Shout)
