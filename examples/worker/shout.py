"""A model's worker: it takes text, and says it louder."""

from dynamo_grpc import ModelInput, Worker, run


class Shout(Worker):
    model_name = "shout"
    model_input = ModelInput.Text  # text and messages; without it, generate gets token ids

    async def generate(self, request, context):
        text = request.text or request.messages[-1].content[0].text.text
        for word in text.split():
            yield word.upper() + " "


if __name__ == "__main__":
    run(Shout)
