"""A CLIP that an audit can train without files or the Hub: small, with random weights."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from ..seeding import seeded


try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ModuleNotFoundError:
    # Earlier releases of transformers have only this one.
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

IMAGE_SIZE = 28
MAX_LENGTH = 77
# Every byte, inside a word and at its end.
BYTES = [byte + end for end in ("", "</w>") for byte in sorted(ByteLevel.alphabet())]
BOS, EOS = len(BYTES), len(BYTES) + 1


def small_clip() -> CLIPModel:
    """669 thousand parameters, the same each time."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": EOS + 1, "max_position_embeddings": MAX_LENGTH}
    text |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    image = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    image |= {"image_size": IMAGE_SIZE, "patch_size": 7}
    with seeded(0):
        return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=64))


def small_processor() -> CLIPProcessor:
    """Images of [`small_clip`]'s size, and one token per byte of a text."""
    vocabulary = {token: number for number, token in enumerate([*BYTES, "<|startoftext|>", "<|endoftext|>"])}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_LENGTH),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
    )
