"""The recurrent network: an LSTM that reads the prompt, and an LSTM that writes after it, one token at a time.

Token ids -> embedding -> encoder -> its last memory -> decoder -> head -> logits: the sequence-to-sequence network of
Sutskever, Vinyals and Le (2014, arXiv:1409.3215) as a language model. A layer's memory is two vectors, what it says (h)
and what it keeps to itself (c), and one token changes both through four gates (Hochreiter and Schmidhuber 1997,
doi:10.1162/neco.1997.9.8.1735; the forget gate: Gers, Schmidhuber and Cummins 2000, doi:10.1162/089976600300015015):

    i, f, g, o = W x + U h + b          input gate, forget gate, candidate, output gate
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h = sigmoid(o) * tanh(c)

What a common sketch of this network gets wrong, and what holds here:

- *Shapes of the state.* What the encoder hands over is, for each layer, h and c after the prompt's last token:
  2 x (layers, B, H). It is neither the sequence of outputs, (B, T, H), nor h alone, nor the last layer's copied to all:
  a decoder of that shape and depth cannot start from anything else. Rows whose prompts end at different places hand
  over what they hold at their own ends, not what padding has made of it.
- *What the decoder reads.* Its input at each step is a token, the one written before (at first the prompt's last one),
  looked up in the embedding. Hidden states are not put where tokens belong: the encoder's outputs are no input
  of the decoder, and neither is the decoder's own h, which it has in its state already. Nothing that was chosen
  would enter the network otherwise, and it could not know what it has written.
- *What comes out.* Logits over the vocabulary for each step, so h goes through the head; h itself is no distribution.

Why there is no KV cache: the memory *is* what is kept of the past, `layers` x 2 x H numbers however long the text, so
a decoded token costs the same at position 10 and at 10,000. The price is paid while reading: each step needs the one
before, so that a prompt cannot be read in one matrix product, and what does not fit into the memory is forgotten.
Decoding one token reads the decoder's weights and the head's; the encoder's are read for the prompt alone.

    python pipelines/pretrain.py plan=lstm model=lstm

Modules are named so that every matrix is a `_proj.weight`, which is what compression looks for.
Shapes: B batch, T tokens, H width of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.model.lstm_config import LstmConfig
from hasten.model.network import Network, State

Memory = list[tuple[Tensor, Tensor]]
"""h and c of each layer, (B, H) each."""

SHUT = -1e4
"""What shuts a gate entirely, in any precision: sigmoid(SHUT) is 0."""


class Carried(State):
    """The decoder's memory of one batch; before the first token, none: then the encoder makes it."""

    def __init__(self, config: LstmConfig, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(config.layers, 2, batch, config.hidden_size, dtype=dtype, device=device)
        self.length = 0

    @property
    def encoded(self) -> bool:
        """Whether the encoder has read a prompt: what comes now is the decoder's."""
        return self.length > 0

    @property
    def bytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def clear(self) -> None:
        self.length = 0

    def memory(self, dtype: torch.dtype) -> Memory:
        """What was kept, to be computed with in `dtype`."""
        return [(h, c) for h, c in self.values.to(dtype)]

    def keep(self, memory: Memory, tokens: int) -> None:
        """Replace the memory by that after `tokens` more."""
        for kept, (h, c) in zip(self.values, memory, strict=True):
            kept[0], kept[1] = h.detach(), c.detach()
        self.length += tokens


class Matrix(nn.Module):
    """What a linear layer holds, (out, in) and (out,), for the fused kernel; it is never called itself."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)


class Layer(nn.Module):
    """One LSTM layer. Gates in the order of the equations above, which is torch's."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input_proj = Matrix(inputs, 4 * hidden, bias=True)  # W and b
        self.hidden_proj = Matrix(hidden, 4 * hidden, bias=False)  # U
        self.hidden = hidden

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], absent: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, inputs) -> h at every step (B, T, H), and the memory after the last.

        absent, (B, T, 1): 1 where a row has no token yet, before its first one. A memory that is zero stays exactly
        zero there: an additional input shuts the input gate, so that nothing is added to c, and h = o * tanh(0). So
        rows of different lengths end together, and the fused kernel reads them all at once.
        """
        h, c = memory
        w: Tensor = self.input_proj.weight
        u, b = self.hidden_proj.weight, self.input_proj.bias
        assert b is not None
        if x.shape[1] == 1 and absent is None:  # a step of decoding: the fused kernel would pack its weights for it
            h, c = torch.lstm_cell(x[:, 0], [h, c], w, u, b, torch.zeros_like(b))
            return h[:, None], (h, c)
        if absent is not None:
            shut = torch.zeros(4 * self.hidden, 1, dtype=w.dtype, device=w.device)
            shut[: self.hidden] = SHUT
            x, w = torch.cat([x, absent], dim=-1), torch.cat([w, shut], dim=-1)
        weights = [w, u, b, torch.zeros_like(b)]  # torch has two biases, which only ever act as their sum
        keep = torch.is_grad_enabled()  # what the backward pass needs
        said, h, c = torch.lstm(x, [h[None], c[None]], weights, True, 1, 0.0, keep, False, True)
        return said, (h[0], c[0])


class Coder(nn.Module):
    """A stack of layers: the encoder, and the decoder.

    Dropout acts on what a layer says to the next one and to the head, never on what it says to itself a step later, or
    nothing would be remembered for long (Zaremba, Sutskever and Vinyals 2014, arXiv:1409.2329).
    """

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        widths = [config.input_width] + [config.hidden_size] * (config.layers - 1)
        self.layers = nn.ModuleList(Layer(width, config.hidden_size) for width in widths)
        self.dropout = nn.Dropout(0.0)
        self.hidden = config.hidden_size

    def forward(self, x: Tensor, memory: Memory | None = None, absent: Tensor | None = None) -> tuple[Tensor, Memory]:
        """x (B, T, inputs) -> h of the last layer at every step (B, T, H), and the memory after the last."""
        if memory is None:
            nothing = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype, device=x.device)
            memory = [(nothing, nothing)] * len(self.layers)
        after: Memory = []
        for layer, before in zip(self.layers, memory, strict=True):
            said, now = layer(x, before, absent)
            x = self.dropout(said)
            after.append(now)
        return x, after


class Stack(nn.Module):
    """Everything below the head (the checkpoint's `model.`)."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.input_width)
        self.encoder = Coder(config)
        self.decoder = Coder(config)

    def read(self, ids: Tensor, prompt_tokens: Tensor) -> Memory:
        """The encoder's memory after each row's prompt, the first prompt_tokens (B,) of ids (B, T)."""
        longest = int(prompt_tokens.max())
        places = torch.arange(longest, device=ids.device) - (longest - prompt_tokens)[:, None]  # (B, longest)
        early = places < 0
        x = self.embed_tokens(ids.gather(1, places.clamp(min=0)))
        _, memory = self.encoder(x, absent=early[..., None].to(x.dtype) if early.any() else None)
        return list(memory)

    def write(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The decoder's h after each of ids (B, T), (B, T, H), and its memory after the last."""
        said, after = self.decoder(self.embed_tokens(ids), memory)
        return said, after


class Lstm(Network):
    """ids (B, T) -> logits (B, T, vocabulary), float32.

    Without a state, the encoder reads one token and the decoder, beginning with the same one, predicts after each. With
    an empty state, ids are a prompt for the encoder; with one that has read a prompt, they are what the decoder reads.
    """

    predicts_prompt = False
    separates_documents = False
    can_recompute = False
    config: LstmConfig
    model: Stack

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config, Stack(config))

    def blocks(self) -> list[nn.Module]:
        return [*self.model.encoder.layers, *self.model.decoder.layers]

    def set_dropout(self, share: float) -> None:
        self.model.encoder.dropout.p = self.model.decoder.dropout.p = share

    def initialise(self, seed: int) -> None:
        """Random weights for training from scratch.

        Embeddings are normal with `initializer_range`, other matrices with 1 / sqrt(input width). Biases are zero, but
        one for the forget gates: a memory that begins by forgetting learns nothing from far away (Jozefowicz, Zaremba
        and Sutskever 2015, https://proceedings.mlr.press/v37/jozefowicz15.html).
        """
        generator = torch.Generator().manual_seed(seed)
        embeddings = (self.model.embed_tokens.weight, self.lm_head.weight)
        with torch.no_grad():
            for weight in self.parameters():
                if weight.dim() < 2:
                    weight.zero_()
                    weight[self.config.hidden_size : 2 * self.config.hidden_size] = 1.0
                    continue
                embedding = any(weight is one for one in embeddings)
                spread = self.config.initializer_range if embedding else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)

    def hidden(self, ids: Tensor, prompt_tokens: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """See `Network.hidden`. The encoder reads ids[:p], the decoder ids[p - 1:], each row with its own p."""
        if documents is not None:
            raise UserError("an LSTM reads on from one document to the next; set training.documents_apart=false")
        length = ids.shape[1]
        if prompt_tokens is None:
            prompt_tokens = torch.ones(len(ids), dtype=torch.int64, device=ids.device)
        assert int(prompt_tokens.min()) >= 1 and int(prompt_tokens.max()) <= length
        first = (prompt_tokens - 1)[:, None]  # (B, 1), the place of the decoder's first input
        steps = torch.arange(length - int(first.min()), device=ids.device)
        inputs = ids.gather(1, (first + steps).clamp(max=length - 1))  # rows begin together; past the end: never used
        said, _ = self.model.write(inputs, self.model.read(ids, prompt_tokens))
        places = (torch.arange(length, device=ids.device) - first).clamp(min=0)  # (B, T), back to where they belong
        return said.gather(1, places[..., None].expand(-1, -1, said.shape[2]))

    def new_state(self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Carried:
        return Carried(self.config, batch, dtype, device)

    def forward(self, ids: Tensor, cache: State | None = None) -> Tensor:
        if cache is None:
            logits: Tensor = self.lm_head(self.hidden(ids))
            return logits.float()
        assert isinstance(cache, Carried)
        if cache.encoded:
            memory, inputs = cache.memory(self.lm_head.weight.dtype), ids
        else:
            memory, inputs = self.model.read(ids, torch.full((len(ids),), ids.shape[1], device=ids.device)), ids[:, -1:]
        said, after = self.model.write(inputs, memory)
        cache.keep(after, ids.shape[1])
        logits = self.lm_head(said[:, -1:])
        return logits.float()
