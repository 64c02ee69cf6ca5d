"""The HTTP front door: preprocess, route, relay, postprocess, in OpenAI's shapes."""
