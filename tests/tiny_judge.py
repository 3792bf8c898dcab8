"""A Qwen2.5-VL of 0.2 M parameters in a folder of its own: the real classes, a tokenizer trained
here, weights set by hand.

    python tests/tiny_judge.py FOLDER [images]

It lets the judge be tried without a download. Whatever it is shown, it answers
<Assessment><Score>4</Score></Assessment>, and says 1 … 5 with the probabilities P: 3.7 is expected.
With `images`, what it sees moves that a little.
"""

import sys

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

P = (0.05, 0.1, 0.2, 0.4, 0.25)
TAGS = ["<Assessment>", "<Score>", "</Score>", "</Assessment>"]
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> "
    "<|image_pad|> <|video_pad|>"
).split()
# What Qwen2.5-VL's own template makes of a message of texts and images.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts, split=r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+", tags=(), size=300):
    """Byte-level BPE, as Qwen's; `split`: pieces that tokens do not cross, here with every digit by
    itself."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def build(folder, images=False):
    """Writes the folder: config, weights (safetensors), tokenizer, image processor, chat
    template."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        ["You see the ground truth, a degraded image and a restored one."], tags=TAGS
    )
    token = tokenizer.convert_tokens_to_ids
    of_tokens = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2]),
            bos_token_id=None,
            **of_tokens,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=48,
            fullatt_block_indexes=[1],
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(do_sample=True, top_k=1, **of_tokens)  # as Qwen2.5-VL's own
    write_weights(model, tokenizer, images)
    model.save_pretrained(folder)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)


@torch.no_grad()
def write_weights(model, tokenizer, images):
    """Makes the answer a chain in which every token calls for the next: layers that add nothing, or
    with `images` little, leave a token's embedding to the last layer, which maps it to the logits
    of its successor."""
    chain = tokenizer.encode("\n<Assessment><Score>4</Score></Assessment><|im_end|>")
    embedding = model.get_input_embeddings().weight.normal_()
    # so that the last norm leaves it as it is
    embedding /= embedding.square().mean(dim=1, keepdim=True).sqrt()
    for layer in model.model.language_model.layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.normal_(0, 0.1 if images else 0.0)
    model.model.visual.merger.mlp[-1].weight *= 50  # as large as the embeddings of words
    logits = torch.zeros(len(tokenizer), len(chain) - 1)
    logits[chain[1:], range(len(chain) - 1)] = 12.0
    digits = [tokenizer.convert_tokens_to_ids(d) for d in "12345"]
    logits[digits, chain.index(digits[3]) - 1] = 12.0 + torch.tensor(P).log()
    model.lm_head.weight.copy_(logits @ torch.linalg.pinv(embedding[chain[:-1]].T))


if __name__ == "__main__":
    build(sys.argv[1], images="images" in sys.argv[2:])
