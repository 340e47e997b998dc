"""Tables 1 and 5: how much one layer says of all, of attribution scores and of the Hessian's largest eigenvalues.

r         Pearson's r of the dot products of one layer's gradients with those of whole gradients, over 2^12 pairs of
          sequences, see `language_model`; "cosines" is that of cosines with cosines
eig. err  λ_1..λ_10 are the largest eigenvalues of the Hessian and μ_1..μ_10 those of one layer's block of it. The error
          is the mean of |c μ_i - λ_i| / λ_i over i, at the best c > 0 by least squares, c = Σ μ_i λ_i / Σ μ_i²;
          "at best" is the same at the c that makes the mean least. The paper does not say which c it takes
c         of least squares: 1 if the block's eigenvalues are of the same size as those of all

The Hessian is that of the mean loss of --examples training sequences, without dropout, by `Hessian(parameters=...)`;
all eigenvalues are converged, with relative residuals of at most 1e-2, or marked "?".

What differs: their models are a pretrained GPT-2 that was fine-tuned on WikiText-103 and a BART on zsRE, ours is a GPT
of a sixteenth of its parameters that learned one epoch of sources, byte by byte: the embedding of its 256 tokens is 1 %
of the parameters, where that of a GPT-2 with six layers is half. BART, an encoder and a decoder, has no counterpart.

    python benchmarks/paper/table_1.py [--examples 16] [--small | --full] [--device cuda]

A quarter of an hour of one thread; 6 GB of memory. Needs transformers.

Source: A. Schioppa, arXiv:2402.03994, tables 1 and 5.
"""

from language_model import HALF, Dots, SmallGPT, arguments, prepared, size_of
from sketch_speed import print_table
from torch import Tensor

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.curvature import Hessian, Spectrum, spectrum

TOP = 10
PAPER = {  # r and error; token embedding, then layers 1 to 6
    "tok. embedding": (0.16, 0.72),
    "layer 1": (0.75, 0.24),
    "layer 2": (0.89, 0.31),
    "layer 3": (0.90, 0.19),
    "layer 4": (0.89, 0.24),
    "layer 5": (0.78, 0.37),
    "layer 6": (0.38, 0.40),
}
PAPER_BART = {
    "tok. embedding": (0.54, 0.20),
    "decoder 1": (0.62, 0.39),
    "decoder 2": (0.88, 0.43),
    "decoder 3": (0.73, 0.28),
    "decoder 4": (0.91, 0.28),
    "decoder 5": (0.84, 0.19),
    "decoder 6": (0.70, 0.18),
    "encoder 1": (0.41, 0.50),
    "encoder 2": (0.45, 0.59),
    "encoder 3": (0.56, 0.48),
    "encoder 4": (0.71, 0.40),
    "encoder 5": (0.91, 0.46),
    "encoder 6": (0.89, 0.16),
}


def top_spectrum(module: SmallGPT, examples: Tensor, pattern: str) -> Spectrum:
    """Return the largest eigenvalues of the Hessian of the parameters whose names match."""
    batches = list(examples.split(16))
    h = Hessian(lambda module, batch: module.training_step([batch]), module, batches, parameters=pattern)
    return spectrum(h, top_k=TOP, bottom_k=0)


def rescaled_errors(part: Tensor, whole: Tensor) -> tuple[float, float, float]:
    """Return the mean relative error at the factor of least squares, the least one of all factors, and the former.

    As a function of the factor the mean has kinks where one eigenvalue is met exactly, and is linear between these.

    Raises:
        ValueError: If no factor above 0 is best, or an eigenvalue of the whole is not positive.
    """
    factor = float(part @ whole / (part @ part))
    if not (factor > 0 and bool((whole > 0).all())):
        raise ValueError(f"need positive eigenvalues of the whole and a positive factor, got {whole} and {factor}.")

    def error(c: float) -> float:
        return float(((c * part - whole).abs() / whole).mean())

    return error(factor), min(error(float(c)) for c in (whole / part)[part > 0]), factor


def described(found: Spectrum) -> str:
    values = zip(found.eigenvalues[:TOP].tolist(), found.converged[:TOP].tolist(), strict=True)
    return " ".join(f"{value:.3g}{'' if known else '?'}" for value, known in values)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int, default=16, help="sequences that the Hessian's loss is a mean over")
    asked = parser.parse_args()
    size = size_of(asked)
    problem = prepared(size, asked.device)
    examples = problem.examples[: min(asked.examples, HALF)]
    whole = top_spectrum(problem.module, examples, "*")
    spectra = [["all", f"{problem.layout.n:,}", str(whole.num_products), described(whole)]]
    patterns = {"tok. embedding": "*.wte.*"} | {f"layer {i + 1}": f"*.h.{i}.*" for i in range(size.layers)}
    rows = []
    for name, pattern in patterns.items():
        own = Layout.of(problem.module, pattern)
        dots, cosines = Dots.sum(problem.parts[parameter] for parameter in own.names).fidelity(problem.exact)
        part = top_spectrum(problem.module, examples, pattern)
        spectra.append([name, f"{own.n:,}", str(part.num_products), described(part)])
        error, at_best, factor = rescaled_errors(part.eigenvalues[:TOP], whole.eigenvalues[:TOP])
        theirs = [f"{value:.2f}" for value in PAPER[name]]
        ours = [f"{value:.2f}" for value in (dots, cosines, error, at_best, factor)]
        rows.append([name, theirs[0], *ours[:2], theirs[1], *ours[2:]])
    columns = ["theirs, r", "ours, r", "cosines", "theirs, eig. err", "ours, eig. err", "at best", "c"]
    print_table(["GPT", *columns], rows)
    print("Ours, the ten largest eigenvalues\n")
    print_table(["", "parameters", "products", "eigenvalues"], spectra)
    print("Theirs, without a counterpart\n")
    print_table(["BART", "r", "eig. err"], [[name, f"{r:.2f}", f"{e:.2f}"] for name, (r, e) in PAPER_BART.items()])


if __name__ == "__main__":
    main()
