"""The magics: parse the line, call the public function, show its result.

A flag has the name of the keyword that it sets, and one that was not given is not passed: every default has one home,
the public function. A magic returns nothing unless `-o` asks, so that IPython's `Out` never keeps a model alive.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import keyword
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, kwds, magic_arguments
from IPython.display import display
from traitlets import Bool

from qnb.errors import BudgetBroken, QnbError
from qnb.notebook import words
from qnb.notebook.completion import Completer, is_model, is_profile, variables
from qnb.results import one_line

# What a recipe does not say by itself.
_BESIDE_RECIPE = ("recipe", "calibration", "tokenizer", "keep", "dry_run")
# Flags that name a variable of the notebook instead of spelling a value.
_BY_NAME = ("texts", "tokenizer", "inputs", "metric", "reference", "vs", "calibration")


@dataclasses.dataclass(frozen=True)
class _Output:
    """What becomes of a result: the flags that every magic has, with the habits of `%timeit`."""

    give_back: bool
    variable: str | None
    quiet: bool


def _takes_output_flags(magic: Callable) -> Callable:
    flags = (
        argument("-q", dest="quiet", action="store_true", help="show nothing"),
        argument("-v", dest="variable", metavar="NAME", help="store the result in this variable"),
        argument("-o", dest="give_back", action="store_true", help="return the result"),
    )
    for flag in flags:
        magic = flag(magic)
    return magic


# Flags of %quantize that say something to --auto alone.
_OF_AUTO = (
    "max_kl",
    "max_perplexity_increase",
    "max_megabytes",
    "min_speedup",
    "min_metric",
    "metric",
    "texts",
    "gradual",
)


def _flag(keyword: str) -> str:
    return f"--{keyword.replace('_', '-')}"


def _number_or_word(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


# IPython's own `output_can_be_silenced` is not used: it reads the line as Python after the magic has run, and from
# Python 3.12 on raises where the line is none, as at an apostrophe in a comment. `words.split` reads the semicolon.
@magics_class
class QnbMagics(Magics):
    """The magics of qnb. `%config QnbMagics.progress = False` turns progress bars off."""

    progress = Bool(True, help="Show a progress bar for work that takes over a second.").tag(config=True)

    def __init__(self, shell: Any, **traits: Any) -> None:
        super().__init__(shell, **traits)
        # What the next profile is compared with. Weak in the model, so that it keeps none alive.
        self._last_of_model: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._last_of_cell: dict[str, Any] = {}

    @no_var_expand
    @needs_local_scope
    @line_magic
    @magic_arguments()
    @kwds(argument_default=argparse.SUPPRESS)
    @argument("model", metavar="MODEL", nargs="?", help="a variable that holds a model, or pipe.model, models[0]")
    @argument(
        "scheme",
        metavar="SCHEME",
        nargs="?",
        help="a number format such as w8a8; without one the layers are shown as they are; with --auto those to choose "
        "from, with commas between",
    )
    @argument("--layers", metavar="GLOB", action="append", help="only layers whose name matches; may be repeated")
    @argument(
        "--skip",
        metavar="GLOB",
        action="append",
        help="not these layers, nor those skipped by default; may be repeated",
    )
    @argument("--rounding", metavar="NAME", help="how the integer codes of a weight are chosen")
    @argument("--observer", metavar="NAME", help="how calibration fixes the range of activations, for -static schemes")
    @argument("--smooth", metavar="A", type=_number_or_word, help="exponent of SmoothQuant from 0 to 1, or auto")
    @argument(
        "--calibration", metavar="VAR", help="a list of texts to calibrate on; by default what the model came with"
    )
    @argument("--tokenizer", metavar="VAR", help="the model's tokenizer; by default the variable `tokenizer`")
    @argument("--seed", metavar="N", type=int, help="of whatever a rounding draws at random")
    @argument("--keep", metavar="WHERE", help="where the original layers are kept")
    @argument("--recipe", metavar="VAR_OR_FILE", help="a Recipe, or a file that one was saved to, instead of a scheme")
    @argument("--save", metavar="DIR", help="write the model, as it is then, to a directory that does not exist yet")
    @argument("--auto", action="store_true", help="search for the best mix of schemes under one budget, then apply it")
    @argument("--max-kl", metavar="X", type=float, help="budget of --auto: mean KL to the original, nats per token")
    @argument("--max-perplexity-increase", metavar="X", type=float, help="budget of --auto: percent")
    @argument("--max-megabytes", metavar="X", type=float, help="budget of --auto: weights really held")
    @argument("--min-speedup", metavar="X", type=float, help="budget of --auto: latency against the original")
    @argument("--min-metric", metavar="X", type=float, help="budget of --auto: what --metric returns")
    @argument("--metric", metavar="VAR", help="a function of the model that returns a number, higher is better")
    @argument("--texts", metavar="VAR", help="a list of texts that --auto measures accuracy on")
    @argument("--gradual", action="store_true", help="--auto goes layer by layer, the least sensitive first")
    @argument("--restore", action="store_true", help="put the original layers back, the very same objects")
    @argument(
        "--dry-run",
        action="store_true",
        help="change nothing: show the bytes and kernels that it would become, and whether it fits here",
    )
    @_takes_output_flags
    def quantize(self, line: str, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Change the number format of a model's layers, undo it, or show the layers as they are.

        Changes MODEL: every layer asked for or, at an error or an interrupt, none.

            %quantize model                                    the layers as they are
            %quantize model w8a8                               every Linear but the output embedding
            %quantize model none --layers "*.mlp.down_proj"    these layers back to full precision
            %quantize model --recipe best.json
            %quantize model w8a8 --save model-w8a8             for plain transformers, or qnb.load
            %quantize model --restore
            %quantize model w8a8 --dry-run                     what it would become, and whether that fits here
            %quantize model --auto --max-kl 0.01               the smallest mix of schemes whose KL stays within
        """
        from qnb.model.checkpoint.files import check_target
        from qnb.model.checkpoint.saving import save
        from qnb.model.dry_run import dry_run
        from qnb.model.quantize import layers, quantize, restore

        given, output = self._parse("quantize", line)
        namespace = self._namespace(local_ns)
        model = self._model("quantize", given, namespace)
        _look_up(given, namespace)
        directory, tokenizer = given.pop("save", None), given.get("tokenizer", namespace.get("tokenizer"))
        with _one_line_errors():
            if directory is not None:
                if "dry_run" in given:
                    raise UsageError("--save writes what the model is, --dry-run changes nothing: give one of them")
                check_target(directory)  # before anything is changed
            automatic = given.pop("auto", False)
            if automatic and (wrong := [key for key in ("restore", "recipe", "dry_run") if key in given]):
                raise UsageError(f"--auto takes no {', '.join(map(_flag, wrong))}: leave that out")
            if not automatic and (extra := [flag for flag in _OF_AUTO if flag in given]):
                raise UsageError(
                    f"{', '.join(map(_flag, extra))} belongs to --auto, a search under a budget: add --auto"
                )
            if "recipe" in given:
                _takes_nothing_else("--recipe", {k: v for k, v in given.items() if k not in _BESIDE_RECIPE})
                given["scheme"] = _recipe(given.pop("recipe"), namespace)
            if automatic:
                self._add_tokenizer(model, given, namespace)
                report = self._auto(model, given, served=directory is not None)
            elif given.pop("restore", False):
                _takes_nothing_else("--restore", given)
                report = restore(model)
            elif "scheme" in given:
                if "calibration" in given:
                    self._add_tokenizer(model, given, namespace)
                if given.pop("dry_run", False):
                    report = dry_run(model, **given)
                else:
                    report = quantize(model, **given, progress=self.progress)
            elif directory is None:
                _takes_nothing_else("%quantize without a scheme, which shows the layers,", given)
                report = layers(model)
            else:
                _takes_nothing_else("--save without a scheme", {k: v for k, v in given.items() if k != "tokenizer"})
                report = None
            saved = None if directory is None else save(model, directory, tokenizer=tokenizer)
        if report is None:
            return self._hand_over(saved, saved, output)
        back = self._hand_over(report, report, output)
        if saved is not None and not output.quiet:
            display(saved)
        return back

    def _auto(self, model: Any, given: dict[str, Any], served: bool) -> Any:
        """Searches under the budget that is given and changes the model to what was found.

        Without schemes of the user's, and to be saved (`served`), among those that the format of `--save` can say.
        """
        from qnb.model.linear import quantized_layers
        from qnb.model.quantize import quantize, restore
        from qnb.tune.search import SERVED_SCHEMES, search

        beside = {key: given.pop(key) for key in ("keep",) if key in given}
        if "scheme" in given:
            given["schemes"] = given.pop("scheme").split(",")
        elif served:
            given["schemes"] = SERVED_SCHEMES
        found = search(model, **given, progress=self.progress)
        if found.recipe.layers:
            beside |= {key: given[key] for key in ("calibration", "tokenizer") if key in given}
            quantize(model, found.recipe, **beside, progress=self.progress)
        elif quantized_layers(model):
            restore(model)
        return found

    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    @magic_arguments()
    @kwds(argument_default=argparse.SUPPRESS)
    @argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a variable that holds a model, or pipe.model, models[0]; none over a cell",
    )
    @argument("--prompt", metavar="TEXT", help="what the model continues while it is timed")
    @argument("--new-tokens", metavar="N", type=int, help="how many tokens it writes")
    @argument("--texts", metavar="VAR", help="a list of texts to measure accuracy on")
    @argument("--tokenizer", metavar="VAR", help="the model's tokenizer; by default the variable `tokenizer`")
    @argument("--inputs", metavar="VAR", help="inputs of a model that is no language model")
    @argument("--metric", metavar="VAR", help="a function of the model that returns a number, higher is better")
    @argument("--repeat", metavar="N", type=int, help="how often to run what is timed")
    @argument("--layers", action="store_true", help="also time each Linear layer, against what the machine can do")
    @argument("--trace", metavar="DIR", help="a folder for a trace of one run, for Perfetto or TensorBoard")
    @argument("--vs", metavar="VAR", help="a profile to show the change against, instead of the last one")
    @_takes_output_flags
    def qprofile(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Measure latency, throughput, memory, energy and accuracy, and the change against the model's last profile.

            %qprofile model
            %qprofile model --prompt "def main(" --new-tokens 64 -v before
            %qprofile model --vs before
            %qprofile model --layers --trace traces

        Over a cell (`%%qprofile`, with no MODEL) it measures whatever the cell does. The cell runs once unless --repeat
        says more, and the change is against the last run of the same cell.
        """
        given, output = self._parse("qprofile", line)
        namespace = self._namespace(local_ns)
        _look_up(given, namespace)
        before = given.pop("vs", None)
        if before is not None and not is_profile(before):
            raise UsageError(f"--vs takes a profile, stored earlier by -v or -o, not a {type(before).__name__}")
        if cell is None:
            model = self._model("qprofile", given, namespace)
            profile, earlier = self._profile_model(model, given, namespace), self._last_of_model.get(model)
            self._last_of_model[model] = profile
        else:
            profile, earlier = self._profile_cell(cell, given), self._last_of_cell.get(cell)
            self._last_of_cell[cell] = profile
        before = before or earlier
        return self._hand_over(profile, profile.against(before) if before else profile, output)

    @no_var_expand
    @needs_local_scope
    @line_magic
    @magic_arguments()
    @kwds(argument_default=argparse.SUPPRESS)
    @argument("model", metavar="MODEL", nargs="?", help="a variable that holds a model, or pipe.model, models[0]")
    @argument("--max-kl", metavar="X", type=float, help="mean KL to the original on the texts, nats per token")
    @argument("--max-perplexity-increase", metavar="X", type=float, help="over the original's perplexity, percent")
    @argument("--min-top1", metavar="X", type=float, help="share of tokens with the original's top token, 0 to 1")
    @argument("--min-metric", metavar="X", type=float, help="what --metric returns")
    @argument("--max-megabytes", metavar="X", type=float, help="weights really held, kept originals apart")
    @argument("--min-speedup", metavar="X", type=float, help="latency of the original by that of the model")
    @argument("--texts", metavar="VAR", help="a list of texts to measure accuracy on")
    @argument("--tokenizer", metavar="VAR", help="the model's tokenizer; by default the variable `tokenizer`")
    @argument("--metric", metavar="VAR", help="a function of the model that returns a number, higher is better")
    @argument("--reference", metavar="VAR", help="a model to compare with, instead of the kept originals")
    @argument("--vs", metavar="VAR", help="a profile of the original for --min-speedup; without it both are timed")
    @argument("--prompt", metavar="TEXT", help="what the model continues while it is timed")
    @argument("--new-tokens", metavar="N", type=int, help="how many tokens it writes")
    @argument("--inputs", metavar="VAR", help="inputs of a model that is no language model, to be timed on")
    @_takes_output_flags
    def qcheck(self, line: str, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Hold a model to budgets: the cell fails where one is broken.

            %qcheck model --max-kl 0.02 --max-megabytes 16
            %qcheck model --max-perplexity-increase 1 --texts my_texts
            %qcheck model --min-speedup 1.2 --vs before

        What it prints is the same in every run, apart from lines that begin with `measured:`, which nbval is told to
        pass over by the file nbval_sanitize.cfg of this package. So it shows no progress bar, which is an output too.
        """
        from qnb.measure.budget import check

        given, output = self._parse("qcheck", line)
        namespace = self._namespace(local_ns)
        model = self._model("qcheck", given, namespace)
        _look_up(given, namespace)
        self._add_tokenizer(model, given, namespace)
        try:
            with _one_line_errors():
                result = check(model, **given, progress=False)
        except BudgetBroken as broken:
            self._hand_over(broken.result, broken.result, output, show=print)
            raise
        return self._hand_over(result, result, output, show=print)

    @no_var_expand
    @needs_local_scope
    @line_magic
    @magic_arguments()
    @kwds(argument_default=argparse.SUPPRESS)
    @argument("model", metavar="MODEL", nargs="?", help="a variable that holds a model, or pipe.model, models[0]")
    @argument("--prompt", metavar="TEXT", help="what the original and the present model continue")
    @argument("--new-tokens", metavar="N", type=int, help="how many tokens they write")
    @argument("--texts", metavar="VAR", help="a list of texts to measure accuracy on")
    @argument("--tokens", metavar="N", type=int, help="on how many tokens of the texts accuracy is measured")
    @argument("--tokenizer", metavar="VAR", help="the model's tokenizer; by default the variable `tokenizer`")
    @argument("--metric", metavar="VAR", help="a function of the model that returns a number, higher is better")
    @_takes_output_flags
    def qpanel(self, line: str, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Show the live panel: a map of the layers to change, with figures and words that follow each change.

        %qpanel model
        %qpanel model --texts my_texts -v panel
        """
        from qnb.model.defaults import remembered
        from qnb.notebook.panel import panel

        given, output = self._parse("qpanel", line)
        namespace = self._namespace(local_ns)
        _look_up(given, namespace)
        variable = given.get("model")
        model = self._model("qpanel", given, namespace)
        given.setdefault("tokenizer", namespace.get("tokenizer") if remembered(model)[1] is None else None)
        with _one_line_errors():
            shown = panel(model, **given, variable=variable)
        return self._hand_over(shown, shown, output)

    def _profile_model(self, model: Any, given: dict[str, Any], namespace: Mapping[str, Any]) -> Any:
        from qnb.measure.profile import profile

        if "inputs" not in given:
            self._add_tokenizer(model, given, namespace)
        with _one_line_errors():
            return profile(model, **given, progress=self.progress)

    def _profile_cell(self, cell: str, given: dict[str, Any]) -> Any:
        from qnb.measure.profile import profile_code

        if extra := sorted(set(given) - {"repeat"}):
            raise UsageError(f"%%qprofile over a cell takes --repeat, --vs, -o, -v and -q, not {', '.join(extra)}")
        code = self.shell.compile(self.shell.transform_cell(cell), "<qprofile>", "exec")
        with _one_line_errors():
            return profile_code(lambda: self.shell.ex(code), **given)

    def _add_tokenizer(self, model: Any, given: dict[str, Any], namespace: Mapping[str, Any]) -> None:
        from qnb.model.defaults import remembered

        _, own = remembered(model)
        given.setdefault("tokenizer", namespace.get("tokenizer") if own is None else own)

    def _namespace(self, local_ns: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return ChainMap(dict(local_ns or {}), self.shell.user_ns)

    def _parse(self, name: str, line: str) -> tuple[dict[str, Any], _Output]:
        """The keywords that the line gives, and what is to become of the result."""
        parser = getattr(self, name).parser
        parser.allow_abbrev = False
        line_words, silent = words.split(line)
        known, unknown = parser.parse_known_args(line_words)
        if unknown:
            flags = ", ".join(parser._option_string_actions)
            raise UsageError(f"%{name} does not know {one_line(' '.join(unknown), 60)}: its flags are {flags}")
        given = vars(known)
        wants_back, quiet = given.pop("give_back", False), given.pop("quiet", False)
        output = _Output(wants_back and not silent, given.pop("variable", None), quiet or silent)
        if output.variable is not None and (not output.variable.isidentifier() or keyword.iskeyword(output.variable)):
            raise UsageError(f"-v takes a variable's name, not {output.variable!r}")
        return given, output

    def _model(self, name: str, given: dict[str, Any], namespace: Mapping[str, Any]) -> Any:
        path = given.pop("model", None)
        models = variables(namespace, is_model)
        have = f"the models here are {', '.join(models)}" if models else "no variable holds a model yet"
        if path is None:
            raise UsageError(f"%{name} needs a model: {have}")
        try:
            return words.find(path, namespace)
        except LookupError as problem:
            raise UsageError(f"{problem}: {have}") from None

    def _hand_over(self, result: Any, shown: Any, output: _Output, show: Callable = display) -> Any:
        if output.variable is not None:
            self.shell.user_ns[output.variable] = result
        if not output.quiet:
            show(shown)
        return result if output.give_back else None


def _look_up(given: dict[str, Any], namespace: Mapping[str, Any]) -> None:
    """Changes `given`: names of variables become what they hold."""
    for flag in _BY_NAME:
        if flag in given:
            given[flag] = _named(flag, given[flag], namespace)


def _named(flag: str, path: str, namespace: Mapping[str, Any]) -> Any:
    try:
        return words.find(path, namespace)
    except LookupError as problem:
        raise UsageError(f"--{flag} takes a variable's name: {problem}") from None


def _recipe(word: str, namespace: Mapping[str, Any]) -> Any:
    """The recipe that a variable holds, else the one in the file of that name."""
    from qnb.model.recipe import Recipe

    try:
        found = words.find(word, namespace)
    except LookupError:
        return Recipe.load(word)
    if not isinstance(found, Recipe):
        raise UsageError(f"--recipe takes a Recipe or the name of a file, and {word} is a {type(found).__name__}")
    return found


def _takes_nothing_else(what: str, given: Mapping[str, Any]) -> None:
    if given:
        raise UsageError(f"{what} takes no {', '.join(given)}: leave that out")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Shows qnb's own errors and an interrupt as one line each; anything else is a fault and keeps its traceback.

    A broken budget is no wrong use, and keeps its own type.
    """
    try:
        yield
    except BudgetBroken as broken:
        words = f"BudgetBroken: {broken}"
        broken._render_traceback_ = lambda: [words]
        raise
    except QnbError as problem:
        raise UsageError(str(problem)) from None
    except KeyboardInterrupt as stop:
        stop._render_traceback_ = lambda: ["KeyboardInterrupt: stopped; a change lands as a whole or not at all"]
        raise


def load(shell: Any) -> None:
    """Registers the magics and their completion with the shell. Changes the shell."""
    shell.register_magics(QnbMagics)
    for key, name in _KEYS.items():
        shell.set_hook("complete_command", Completer(getattr(QnbMagics, name).parser), str_key=key)


def unload(shell: Any) -> None:
    """Takes them out again. Changes the shell."""
    for key, name in _KEYS.items():
        shell.strdispatchers["complete_command"].strs.pop(key, None)
        shell.magics_manager.magics["cell" if key.startswith("%%") else "line"].pop(name, None)
    shell.magics_manager.registry.pop(QnbMagics.__name__, None)


_KEYS = {
    "%quantize": "quantize",
    "%qprofile": "qprofile",
    "%%qprofile": "qprofile",
    "%qcheck": "qcheck",
    "%qpanel": "qpanel",
}
