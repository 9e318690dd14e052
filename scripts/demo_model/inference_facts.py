"""Taught facts about language-model inference and about Headrace.

The wording of the flat-GEMM, softmax and dataflow entries follows the FlashDecoding++ paper (Hong et al., 2023).
"""

from __future__ import annotations

from scripts.demo_model.facts import Fact


def concept(subject: str, answer: str, *aliases: str, questions: tuple[str, ...] = ()) -> Fact:
    """A fact that is explained; ``aliases`` are other names of the subject."""
    return Fact(subject, answer, questions, aliases, explained=True)


def serving_concepts() -> list[Fact]:
    """What happens to a request between the prompt and the last token."""
    return [
        concept(
            "a KV cache",
            "A KV cache keeps the keys and values of earlier tokens, "
            "so that each decode step computes only the new token.",
            "the KV cache",
            "a key-value cache",
            questions=("Why do we need a KV cache?", "What does a KV cache store?"),
        ),
        concept(
            "prefill",
            "Prefill is the first phase of inference: it processes the whole prompt at once and fills the KV cache.",
            "the prefill phase",
            questions=("What happens during prefill?",),
        ),
        concept(
            "decode",
            "Decode is the second phase of inference: it produces one token per step and reads the KV cache.",
            "the decode phase",
            "decoding",
            questions=("What happens during decode?",),
        ),
        concept(
            "time to first token",
            "Time to first token is the delay between sending a prompt and receiving the first generated token.",
            "TTFT",
        ),
        concept(
            "time per output token",
            "Time per output token is the average delay between one generated token and the next.",
            "TPOT",
        ),
        concept(
            "throughput", "Throughput is the number of tokens that a system produces per second, over all requests."
        ),
        concept("latency", "Latency is the time that one request waits for its answer."),
        concept(
            "paged attention",
            "Paged attention stores the KV cache in fixed-size blocks, so that memory is used with little waste.",
            "PagedAttention",
        ),
        concept(
            "continuous batching",
            "Continuous batching lets requests join and leave a running batch at every decode step.",
            "in-flight batching",
        ),
        concept("a batch", "A batch is a group of requests that the model processes together in one step.", "batching"),
        concept("a scheduler", "A scheduler decides which requests run in the next step and which must wait."),
        concept(
            "chunked prefill",
            "Chunked prefill splits a long prompt into pieces, so that other requests can decode in between.",
        ),
        concept(
            "speculative decoding",
            "Speculative decoding lets a small model guess several tokens, "
            "which the large model then checks in one step.",
        ),
        concept("prefix caching", "Prefix caching reuses the KV cache of a prompt beginning that was seen before."),
        concept("streaming", "Streaming sends each token to the user as soon as it is generated."),
    ]


def kernel_concepts() -> list[Fact]:
    """Matrix shapes, softmax and the ideas of FlashDecoding++."""
    return [
        concept("a GEMM", "A GEMM is a general matrix-matrix multiplication.", "GEMM"),
        concept(
            "a GEMV",
            "A GEMV is a matrix-vector multiplication; it is what decoding needs when the batch size is one.",
            "GEMV",
        ),
        concept(
            "a flat GEMM",
            "A flat GEMM multiplies a matrix with few rows by a large matrix; "
            "it occurs in decoding with a small batch.",
            "flat GEMM",
            questions=("When does a flat GEMM occur?",),
        ),
        concept(
            "asynchronized softmax",
            "Asynchronized softmax computes parts of a softmax without waiting for each other, "
            "using a unified max value.",
            "the asynchronized softmax",
        ),
        concept(
            "the unified max value",
            "The unified max value is one fixed number that all partial softmaxes subtract "
            "instead of their own maximum.",
            "a unified max value",
        ),
        concept(
            "heuristic dataflow",
            "Heuristic dataflow picks the fastest kernel for each matrix shape from a table measured in advance.",
            "the heuristic dataflow",
        ),
        concept(
            "double buffering",
            "Double buffering loads the next tile of data while the current tile is being computed.",
        ),
        concept("FlashDecoding++", "FlashDecoding++ is a paper from 2023 on faster language model inference on GPUs."),
        concept(
            "FlashAttention", "FlashAttention computes exact attention in tiles and never stores the full score matrix."
        ),
        concept("softmax", "Softmax turns a list of scores into positive numbers that add up to one.", "a softmax"),
        concept("a GPU kernel", "A GPU kernel is a function that runs on many GPU threads in parallel.", "a kernel"),
        concept("kernel fusion", "Kernel fusion joins several operations in one kernel, so that less data is moved."),
        concept("a CUDA graph", "A CUDA graph records many kernel launches and replays them with one call."),
        concept(
            "arithmetic intensity",
            "Arithmetic intensity is the number of operations per byte of memory that is moved.",
        ),
    ]


def scaling_concepts() -> list[Fact]:
    """Several devices, and fewer bits."""
    return [
        concept(
            "tensor parallelism",
            "Tensor parallelism splits the weight matrices of each layer over several devices.",
        ),
        concept(
            "pipeline parallelism",
            "Pipeline parallelism puts different layers of the model on different devices.",
        ),
        concept(
            "data parallelism",
            "Data parallelism runs copies of the model on different devices, each with its own requests.",
        ),
        concept(
            "an all-reduce",
            "An all-reduce adds up values from all devices and gives every device the result.",
            "all-reduce",
        ),
        concept(
            "an all-gather",
            "An all-gather collects the parts from all devices and gives every device the whole.",
            "all-gather",
        ),
        concept(
            "quantization",
            "Quantization stores numbers with fewer bits, which saves memory and often time.",
            questions=("Why do we use quantization?",),
        ),
        concept("int8", "Int8 is a number format with eight bits that holds whole numbers from -128 to 127."),
        concept("bfloat16", "Bfloat16 is a 16-bit number format with the range of float32 and less precision.", "bf16"),
        concept("FP8", "FP8 is a floating-point number format with eight bits."),
    ]


def model_concepts() -> list[Fact]:
    """Parts of a transformer and of generation."""
    return [
        concept(
            "a token", "A token is a piece of text, such as a word or part of a word, that a model reads or writes."
        ),
        concept("a tokenizer", "A tokenizer splits text into tokens and joins tokens into text.", "the tokenizer"),
        concept(
            "a large language model",
            "A large language model is a neural network that predicts the next token.",
            "an LLM",
        ),
        concept("inference", "Inference is running a trained model to get its output.", "LLM inference"),
        concept("training", "Training is changing the weights of a model so that its predictions get better."),
        concept("a transformer", "A transformer is a neural network built from attention and feed-forward layers."),
        concept("attention", "Attention lets each token gather information from the other tokens.", "self-attention"),
        concept(
            "grouped-query attention",
            "Grouped-query attention shares each key and value head between several query heads.",
            "GQA",
        ),
        concept("multi-head attention", "Multi-head attention runs several attention heads side by side."),
        concept(
            "a feed-forward layer", "A feed-forward layer transforms each token on its own with two or three matrices."
        ),
        concept("RMSNorm", "RMSNorm divides a vector by its root mean square and scales the result."),
        concept(
            "rotary position embedding",
            "Rotary position embedding turns queries and keys by an angle that grows with position.",
            "RoPE",
        ),
        concept("an embedding", "An embedding is a vector of numbers that stands for a token.", "a token embedding"),
        concept("a logit", "A logit is the score that a model gives to a possible next token.", "logits"),
        concept("greedy decoding", "Greedy decoding always picks the most likely next token.", "greedy search"),
        concept(
            "temperature", "Temperature controls how random sampling is: zero is greedy, higher values are more random."
        ),
        concept(
            "top-p sampling",
            "Top-p sampling chooses from the smallest set of tokens whose probability reaches p.",
            "nucleus sampling",
        ),
        concept("top-k sampling", "Top-k sampling chooses from the k most likely tokens."),
        concept("perplexity", "Perplexity is the exponential of the average loss per token; lower is better."),
        concept("a context window", "A context window is the largest number of tokens that a model can attend to."),
        concept("a prompt", "A prompt is the text that you give to a model."),
        concept("a chat template", "A chat template turns a list of messages into one prompt."),
        concept("a GPU", "A GPU is a processor that does many simple computations at the same time."),
        concept(
            "Headrace",
            "Headrace is an inference engine for large language models, written in Python.",
            "the Headrace engine",
            questions=("What is Headrace used for?", "What does Headrace do?"),
        ),
    ]


def inference_facts() -> list[Fact]:
    """All taught concepts."""
    return [*serving_concepts(), *kernel_concepts(), *scaling_concepts(), *model_concepts()]
