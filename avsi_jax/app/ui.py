"""The page of avsi-app: its parts, and what happens when one is pressed. Gradio draws it; app/session.py does the work."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from avsi_jax.app import rendering
from avsi_jax.app.session import Clip, Limits, Session, SessionStore, written
from avsi_jax.media import clip_io
from avsi_jax.runtime import unexpected_errors

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter

PACKAGE = Path(__file__).parent.parent
EXAMPLES = (  # one of Grid's, and two that tfds_grid.synthetic drew and spoke: examples/README.md
    ("A person", "person.mpg"), ("A drawn mouth", "whole.mp4"), ("A drawn mouth, with a hole", "with_a_hole.mp4"),
)  # fmt: skip
SWEEP = (600, 3600)  # seconds: how often, and from which age on, uploads that no visit holds are deleted
PLAYER = {"interactive": False, "buttons": ["download"], "type": "filepath"}
CAMERA = gr.WebcamOptions(mirror=False, constraints={"video": {"width": 640, "height": 480}})
WAITING = 20  # repairs that may wait for the one that runs
FACES = [("the largest", -1), ("1st from the left", 0), ("2nd", 1), ("3rd", 2), ("4th", 3)]
WAVEFORMS = ("masked", "restored", "original")
TAKEN = ("seen", "heard", "gaps", "start", "told", "results")  # parts that a new clip changes
RESULTS = (
    "results",
    "original_part",
    "told",
    *(f"{n}{rest}" for n in WAVEFORMS for rest in ("", "_drawn")),
    "faces",
    "clip",
    "sound",
)


def build(inpainter: Inpainter, limits: Limits, folder: Path) -> gr.Blocks:
    """The page as gr.Blocks; visits lie in `folder`."""
    sessions = SessionStore(folder, inpainter, limits)
    with gr.Blocks(title="avsi: a clip's sound, whole", analytics_enabled=False, delete_cache=SWEEP) as page:
        gr.HTML(rendering.head(limits))
        parts = _work_part() | _result_part()
        _wire(page, Handlers(sessions), parts)
    return page


def launch(page: gr.Blocks, limits: Limits, host: str, port: int) -> None:
    """Serves the page in threads of its own; OSError where the port is taken."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # the reader's own: none is fetched
    looks = {
        "theme": gr.themes.Default(primary_hue="blue", radius_size="sm", **fonts),
        "css_paths": PACKAGE / "templates" / "app.css",
    }
    quiet = {"quiet": True, "inbrowser": False, "prevent_thread_lock": True, "show_error": False, "footer_links": []}
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    most = int(limits.megabytes * 2**20)
    page.launch(server_name=host, server_port=port, share=False, max_file_size=most, **looks, **quiet)


def _work_part() -> dict:
    """Beside each other: where a clip is put in and what is lost of it is said; what is seen and heard of it."""
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            parts = _clip_part() | _gap_part()
        with gr.Column(scale=6, min_width=300):
            parts["seen"] = gr.HTML(rendering.NOTHING_YET, elem_id="seen")
            parts["heard"] = gr.Audio(label="As it was put in", visible=False, elem_id="heard", **PLAYER)
    return parts


def _clip_part() -> dict:
    parts, kinds = {}, [*clip_io.VIDEO_SUFFIXES, *clip_io.AUDIO_SUFFIXES]
    with gr.Tab("File"):
        parts["file"] = gr.File(label="A clip", file_types=kinds, height=132, elem_id="file")
    with gr.Tab("Camera"):
        camera = {"sources": ["webcam"], "include_audio": True, "webcam_options": CAMERA}
        parts["film"] = gr.Video(label="A film of you speaking", height=230, elem_id="film", **camera)
    with gr.Tab("Microphone"):
        parts["voice"] = gr.Audio(label="Your voice", sources=["microphone"], type="filepath", editable=False, elem_id="voice")
    with gr.Row():
        for name, file in EXAMPLES:
            parts[file] = gr.Button(name, size="sm", min_width=120, elem_id=f"example-{file.partition('.')[0]}")
    gr.HTML(rendering.EXAMPLES)
    return parts


def _gap_part() -> dict:
    parts = {}
    parts["gaps"] = gr.Textbox(
        label="What is lost, in seconds", placeholder="0.93-1.73, 2.1-2.3", max_lines=1, elem_id="gaps",
        info="Found by itself where the sound is silent, repeated or cut off. Or write it.",
    )  # fmt: skip
    parts["find"] = gr.Button("Find holes", size="sm", elem_id="find")
    with gr.Accordion("Nothing lost? Damage it on purpose", open=True, elem_id="purpose"):
        parts["start"] = gr.Slider(0, 3, 1.0, step=0.01, label="A gap from, s", elem_id="start")
        parts["length"] = gr.Slider(40, 2400, 800, step=20, label="of, ms", elem_id="length")
        parts["damage"] = gr.Button("Damage it", size="sm", elem_id="damage")
    with gr.Accordion("More", open=False, elem_id="more"):
        parts["sync"] = gr.Checkbox(label="Sound and picture may be out of step: measure it", elem_id="sync")
        parts["face"] = gr.Radio(FACES, value=-1, label="Whose lips, where there are several faces", elem_id="face")
    parts["restore"] = gr.Button("Restore", variant="primary", elem_id="restore")
    return parts


def _result_part() -> dict:
    parts = {"told": gr.HTML(elem_id="told")}
    with gr.Column(visible=False, elem_id="results") as parts["results"]:
        with gr.Row():
            for name in WAVEFORMS:
                with gr.Column(min_width=280) as parts[f"{name}_part"]:
                    parts[name] = gr.Audio(label=name.capitalize(), elem_id=name, **PLAYER)
                    parts[f"{name}_drawn"] = gr.HTML(elem_id=f"{name}-drawn")
        parts["faces"] = gr.HTML(elem_id="faces")
        with gr.Row():
            parts["clip"] = gr.DownloadButton("Download the restored clip", elem_id="clip")
            parts["sound"] = gr.DownloadButton("Download its sound, .wav", elem_id="sound")
    return parts


def _wire(page: gr.Blocks, handlers: Handlers, parts: dict) -> None:
    """What happens when."""

    def on(event, work, inputs, outputs, shown: str) -> None:
        """shown: the part that says it is at work."""
        wanted = {"concurrency_id": "one at a time", "api_visibility": "private", "show_progress_on": [parts[shown]]}
        event(handlers.handler(work), [parts[n] for n in inputs], [parts[n] for n in outputs], **wanted)

    on(parts["file"].upload, handlers.take, ["file"], TAKEN, "seen")
    on(parts["film"].stop_recording, handlers.take, ["film"], TAKEN, "seen")
    on(parts["voice"].stop_recording, handlers.take, ["voice"], TAKEN, "seen")
    on(parts["file"].clear, handlers.forget, [], TAKEN, "seen")
    for _, file in EXAMPLES:
        on(parts[file].click, functools.partial(handlers.example, file), [], TAKEN, "seen")
    on(parts["find"].click, handlers.find, [], ("gaps", "seen"), "seen")
    on(parts["damage"].click, handlers.damage, ["start", "length"], ("gaps", "seen"), "seen")
    on(parts["gaps"].submit, handlers.redraw, ["gaps"], ["seen"], "seen")
    on(parts["gaps"].blur, handlers.redraw, ["gaps"], ["seen"], "seen")
    on(parts["restore"].click, handlers.restore, ["gaps", "face", "sync"], RESULTS, "told")
    page.unload(handlers.leave)


class Handlers:
    """What the page's buttons do: a visit's answers as values of the page's parts."""

    def __init__(self, sessions: SessionStore):
        self.sessions = sessions

    def handler(self, work):
        """work(visit, *inputs) as Gradio calls it; what a visitor did wrong is told in one line."""

        def handle(request: gr.Request, *inputs):
            visit = self.sessions.of(request.session_hash)
            try:
                with visit.lock:
                    return work(visit, *inputs)
            except (ValueError, OSError) as error:
                raise gr.Error(rendering.line(error), title="", duration=15, print_exception=False) from None
            except Exception as error:
                print(f"avsi-app: {unexpected_errors.explain(error)}", file=sys.stderr, flush=True)
                line = f"That did not work ({type(error).__name__}); the terminal of avsi-app says more"
                raise gr.Error(line, title="", print_exception=False) from None

        return handle

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        self.sessions.end(request.session_hash)

    def take(self, visit: Session, file: str | None) -> tuple:
        return self._taken(visit.take(file) if file else None)

    def example(self, name: str, visit: Session) -> tuple:
        return self._taken(visit.take(PACKAGE / "examples" / name))

    def forget(self, visit: Session) -> tuple:
        visit.forget()
        return self._taken(None)

    def _taken(self, clip: Clip | None) -> tuple:
        """Values of TAKEN for a new clip, or none."""
        if clip is None:
            return rendering.NOTHING_YET, gr.update(visible=False, value=None), "", gr.update(), "", gr.update(visible=False)
        start = gr.update(maximum=round(clip.duration_s, 2), value=round(0.35 * clip.duration_s, 2))
        heard = gr.update(visible=True, value=str(clip.heard))
        return rendering.clip(clip, clip.gaps), heard, written(clip.gaps), start, "", gr.update(visible=False)

    def find(self, visit: Session) -> tuple:
        clip = visit.found()
        return written(clip.gaps), rendering.clip(clip, clip.gaps)

    def damage(self, visit: Session, start_s: float, length_ms: float) -> tuple:
        gaps = visit.damage(start_s, length_ms)
        return written(gaps), rendering.clip(visit.clip, gaps)

    def redraw(self, visit: Session, text: str) -> str:
        if visit.clip is None:
            return rendering.NOTHING_YET
        return rendering.clip(visit.clip, visit.check_gaps(text))

    def restore(self, visit: Session, text: str, face: int | None, sync: bool) -> tuple:
        result = visit.restore(text, face=None if face is None or face < 0 else int(face), sync="auto" if sync else "off")
        drawn = rendering.compared(visit.clip, result, result.gaps)
        waveforms = {name: str(file) for name, file in result.waveforms.items()}
        players = [v for name in WAVEFORMS for v in (waveforms.get(name), drawn.get(name, ""))]
        files = gr.update(value=str(result.clip), label=f"Download {result.clip.name}"), waveforms["restored"]
        shown = gr.update(visible=True), gr.update(visible="original" in waveforms)
        return *shown, rendering.told(result), *players, rendering.faces(result), *files
