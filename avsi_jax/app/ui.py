"""The page of avsi-app: its components and their event handlers. Gradio renders it; app/session.py does the work."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio import processing_utils

from avsi_jax.app import rendering
from avsi_jax.app.session import Limits, Session, SessionStore, UploadedClip, format_gaps
from avsi_jax.media import clip_io
from avsi_jax.runtime import unexpected_errors

if TYPE_CHECKING:
    from avsi_jax.inpainting.api import Inpainter

PACKAGE = Path(__file__).parent.parent
EXAMPLES = (  # one from the Grid corpus, two made by tfds_grid.synthetic: examples/README.md
    ("A person", "person.mpg"), ("A drawn mouth", "drawn_mouth.mp4"), ("A drawn mouth, with a gap", "drawn_mouth_with_gap.mp4"),
)  # fmt: skip
DELETE_UNUSED = (600, 3600)  # seconds: how often, and from which age on, uploads that no session holds are deleted
PLAYER = {"interactive": False, "buttons": ["download"], "type": "filepath"}
WEBCAM = gr.WebcamOptions(mirror=False, constraints={"video": {"width": 640, "height": 480}})
MAX_QUEUE = 20  # restorations that may wait for the one that runs
FACES = [("the largest", -1), ("1st from the left", 0), ("2nd", 1), ("3rd", 2), ("4th", 3)]
WAVEFORMS = ("masked", "restored", "original")
ORIGINS = ("file", "camera", "microphone")  # components from which a clip comes
# The components that events change. `token` is not shown: it says for which clip and gaps the server made what the page shows.
GAP_OUTPUTS = ("gaps", "preview", "token", "summary", "results")
CLIP_OUTPUTS = (*GAP_OUTPUTS, "input_audio", "start", *ORIGINS)
REFRESH_OUTPUTS = (*GAP_OUTPUTS, "input_audio", *ORIGINS)
RESULT_OUTPUTS = (
    "results", "original_column", "summary", *(f"{n}{rest}" for n in WAVEFORMS for rest in ("", "_plot")), "faces", "clip_file",
    "audio_file",
)  # fmt: skip


def build(inpainter: Inpainter, limits: Limits, folder: Path) -> gr.Blocks:
    """The page; sessions keep their files in `folder`."""
    processing_utils.ffmpeg_installed = lambda: False  # Gradio would start ffprobe on each file that is played
    sessions = SessionStore(folder, inpainter, limits)
    with gr.Blocks(title="Restore gaps in speech", analytics_enabled=False, delete_cache=DELETE_UNUSED) as page:
        gr.HTML(rendering.head(limits))
        components = _input_components() | _result_components()
        _connect(page, Handlers(sessions), components)
    return page


def launch(page: gr.Blocks, limits: Limits, host: str, port: int) -> None:
    """Serves the page in background threads. Raises OSError if the port is in use."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # installed ones: none is downloaded
    style = {
        "theme": gr.themes.Default(primary_hue="blue", radius_size="sm", **fonts),
        "css_paths": PACKAGE / "templates" / "app.css",
    }
    quiet = {"quiet": True, "inbrowser": False, "prevent_thread_lock": True, "show_error": False, "footer_links": []}
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    max_bytes = int(limits.megabytes * 2**20)
    page.launch(server_name=host, server_port=port, share=False, max_file_size=max_bytes, **style, **quiet)


def _input_components() -> dict[str, Any]:
    """Side by side: where a clip is uploaded and its gaps are entered; a plot and a player of it."""
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            components = _clip_components() | _gap_components()
        with gr.Column(scale=6, min_width=300):
            components["preview"] = gr.HTML(rendering.NO_CLIP_YET, elem_id="preview")
            components["input_audio"] = gr.Audio(label="Input", visible=False, elem_id="input-audio", **PLAYER)
    return components


def _clip_components() -> dict[str, Any]:
    components, kinds = {}, ["video", "audio", *clip_io.MEDIA_SUFFIXES]
    with gr.Tab("File"):
        components["file"] = gr.File(label="Clip", file_types=kinds, height=132, elem_id="file")
    with gr.Tab("Camera"):
        options = {"sources": ["webcam"], "include_audio": True, "webcam_options": WEBCAM}
        components["camera"] = gr.Video(label="Video of you speaking", height=230, elem_id="camera", **options)
    with gr.Tab("Microphone"):
        components["microphone"] = gr.Audio(
            label="Your voice", sources=["microphone"], type="filepath", editable=False, elem_id="microphone"
        )
    with gr.Row():
        for name, file in EXAMPLES:
            components[file] = gr.Button(name, size="sm", min_width=120, elem_id=f"example-{file.partition('.')[0]}")
    gr.HTML(rendering.EXAMPLES)
    return components


def _gap_components() -> dict[str, Any]:
    components = {}
    components["gaps"] = gr.Textbox(
        label="Gaps, in seconds", placeholder="0.93-1.73, 2.1-2.3", max_lines=1, elem_id="gaps",
        info="Detected where the audio is silent, repeated or clipped. You can also enter them.",
    )  # fmt: skip
    components["token"] = gr.Textbox(visible="hidden", elem_id="token")
    components["detect"] = gr.Button("Detect gaps", size="sm", elem_id="detect")
    with gr.Accordion("No gap? Make one for a test", open=True, elem_id="test-gap"):
        components["start"] = gr.Slider(0, 3, 1.0, step=0.01, label="Start, s", elem_id="start")
        components["length"] = gr.Slider(40, 2400, 800, step=20, label="Length, ms", elem_id="length")
        components["make_gap"] = gr.Button("Make a gap", size="sm", elem_id="make-gap")
    with gr.Accordion("More", open=False, elem_id="more"):
        components["sync"] = gr.Checkbox(label="Measure and correct the A/V offset", elem_id="sync")
        components["face"] = gr.Radio(FACES, value=-1, label="Which face is speaking, if there are several", elem_id="face")
    components["restore"] = gr.Button("Restore", variant="primary", elem_id="restore")
    return components


def _result_components() -> dict[str, Any]:
    components = {"summary": gr.HTML(elem_id="summary")}
    with gr.Column(visible=False, elem_id="results") as components["results"]:
        with gr.Row():
            for name in WAVEFORMS:
                with gr.Column(min_width=280) as components[f"{name}_column"]:
                    components[name] = gr.Audio(label=name.capitalize(), elem_id=name, **PLAYER)
                    components[f"{name}_plot"] = gr.HTML(elem_id=f"{name}-plot")
        components["faces"] = gr.HTML(elem_id="faces")
        with gr.Row():
            components["clip_file"] = gr.DownloadButton("Download the restored clip", elem_id="clip-file")
            components["audio_file"] = gr.DownloadButton("Download its audio, .wav", elem_id="audio-file")
    return components


def _connect(page: gr.Blocks, handlers: Handlers, components: dict[str, Any]) -> None:
    """Connects events to handlers."""

    def on(event: Callable, work: Callable, inputs: Sequence[str], outputs: Sequence[str], progress: str) -> Any:
        """progress: the component that shows that the handler is running."""
        options = {"concurrency_id": "one at a time", "api_visibility": "private", "show_progress_on": [components[progress]]}
        return event(handlers.handler(work), [components[n] for n in inputs], [components[n] for n in outputs], **options)

    def on_user(event: Callable, work: Callable, inputs: Sequence[str], outputs: Sequence[str], progress: str) -> Any:
        """As `on`; after an error the page shows what the session then has, no longer what was there before."""
        dependency = on(event, work, inputs, outputs, progress)
        on(dependency.failure, handlers.refresh, ["gaps"], REFRESH_OUTPUTS, progress)
        return dependency

    on_user(components["file"].upload, functools.partial(handlers.load, "file"), ["file"], CLIP_OUTPUTS, "preview")
    for name in ("camera", "microphone"):
        on_user(components[name].stop_recording, functools.partial(handlers.load, name), [name], CLIP_OUTPUTS, "preview")
    on_user(components["file"].clear, handlers.clear, [], CLIP_OUTPUTS, "preview")
    for _, file in EXAMPLES:
        on_user(components[file].click, functools.partial(handlers.example, file), [], CLIP_OUTPUTS, "preview")
    on_user(components["detect"].click, handlers.detect, ["token", "gaps"], GAP_OUTPUTS, "preview")
    on_user(components["make_gap"].click, handlers.make_gap, ["token", "start", "length"], GAP_OUTPUTS, "preview")
    shown = ["token", "gaps", "face", "sync"]
    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    inputs, outputs = [components[n] for n in shown], [components["summary"], components["results"]]
    for name in ("gaps", "face", "sync"):  # Gradio's event `input` of a text box misses text that is pasted or deleted
        components[name].change(handlers.handler(handlers.hide_old_result, locked=False), inputs, outputs, **at_once)
    on_user(components["gaps"].submit, handlers.redraw, ["token", "gaps"], ["preview"], "preview")
    on_user(components["gaps"].blur, handlers.redraw, ["token", "gaps"], ["preview"], "preview")
    restored = on_user(components["restore"].click, handlers.restore, shown, RESULT_OUTPUTS, "summary")
    on(restored.success, handlers.replace_old_result, shown, ["summary", "results"], "summary")
    page.unload(handlers.leave)


class Handlers:
    """Event handlers: each calls a session and returns new values of the page's components."""

    def __init__(self, sessions: SessionStore):
        self.sessions = sessions

    def handler(self, work: Callable, locked: bool = True) -> Callable:
        """work(session, *inputs) as a function that Gradio can call; a user's mistakes are shown in one line.

        locked: whether it waits for other work on the session, which it must if it changes the session.
        """

        def handle(request: gr.Request, *inputs):
            session = self.sessions.get(request.session_hash)
            try:
                with session.lock if locked else contextlib.nullcontext():
                    try:
                        return work(session, *inputs)
                    finally:
                        if session.ended:  # the page was closed meanwhile: files that were written since are deleted too
                            session.clear()
            except (ValueError, OSError) as error:
                raise gr.Error(rendering.error_line(error), title="", duration=15, print_exception=False) from None
            except Exception as error:
                print(f"avsi-app: {unexpected_errors.explain(error)}", file=sys.stderr, flush=True)
                line = f"Unexpected error ({type(error).__name__}); see the terminal of avsi-app"
                raise gr.Error(line, title="", print_exception=False) from None

        return handle

    def leave(self, request: gr.Request) -> None:
        """Called when a page is closed."""
        self.sessions.end(request.session_hash)

    def load(self, origin: str, session: Session, file: str | None) -> tuple:
        """An upload or a recording; origin: the component it comes from."""
        return self._loaded(session, session.load(file) if file else None, origin)

    def example(self, name: str, session: Session) -> tuple:
        """One of the examples."""
        return self._loaded(session, session.load(PACKAGE / "examples" / name))

    def clear(self, session: Session) -> tuple:
        """The upload is removed."""
        session.clear()
        return self._loaded(session, None)

    def _loaded(self, session: Session, clip: UploadedClip | None, origin: str = "") -> tuple:
        """Values of CLIP_OUTPUTS for a new clip, or for none. Uploads and recordings that it replaces are removed."""
        others = [gr.skip() if name == origin else None for name in ORIGINS]
        if clip is None:
            hidden = gr.update(visible=False, value=None)
            return "", rendering.NO_CLIP_YET, session.token, *self.hide_result(), hidden, gr.skip(), *others
        start = gr.update(maximum=round(clip.duration_s, 2), value=round(0.35 * clip.duration_s, 2))
        player = gr.update(visible=True, value=str(clip.playable))
        return *self._with_gaps(session, clip.detected_gaps), player, start, *others

    def _with_gaps(self, session: Session, gaps: Sequence[tuple]) -> tuple:
        """Values of GAP_OUTPUTS for gaps that the session has set."""
        return format_gaps(gaps), rendering.clip(session.clip, gaps), session.token, *self.hide_result()

    @staticmethod
    def hide_result() -> tuple:
        """Values of the summary and the results for a result that no longer belongs to the clip and the gaps that are shown."""
        return "", gr.update(visible=False)

    def refresh(self, session: Session, text: str) -> tuple:
        """Values of REFRESH_OUTPUTS after an error."""
        if session.clip is None:
            shown = self._loaded(session, None)
            return *shown[: len(GAP_OUTPUTS) + 1], *shown[-len(ORIGINS) :]
        preview = rendering.clip(session.clip, self._entered(session, text))
        return gr.skip(), preview, gr.skip(), *self.hide_result(), gr.skip(), *[gr.skip() for _ in ORIGINS]

    @staticmethod
    def _entered(session: Session, text: str) -> list:
        """The gaps that are entered; none if they cannot be read."""
        try:
            return session.check_gaps(text)
        except ValueError:
            return []

    def detect(self, session: Session, token: str, text: str) -> tuple:
        """The detected gaps and the clip with them; if there are none, what is entered stays."""
        clip = session.use_detected_gaps(token or "")
        if clip.detected_gaps:
            return self._with_gaps(session, clip.detected_gaps)
        entered = self._entered(session, text)
        note = "No gap detected; those that you entered stay." if entered else ""
        return gr.skip(), rendering.clip(clip, entered, note), gr.skip(), gr.skip(), gr.skip()

    def make_gap(self, session: Session, token: str, start_s: float, length_ms: float) -> tuple:
        """A gap for a test, and the clip with it."""
        return self._with_gaps(session, session.make_gap(start_s, length_ms, token or ""))

    def redraw(self, session: Session, token: str, text: str) -> str:
        """The clip with the gaps that were entered."""
        if session.clip is None:
            return rendering.NO_CLIP_YET
        if token != session.token:  # of a clip or of gaps that are replaced
            return gr.skip()
        return rendering.clip(session.clip, session.check_gaps(text))

    def hide_old_result(self, session: Session, *shown: Any) -> tuple:
        """Called when the gaps or an option change. shown: token, gaps, face and sync, as in `restore`."""
        return (gr.skip(), gr.skip()) if session.result_is_current(*self._request(*shown)) else self.hide_result()

    def replace_old_result(self, session: Session, *shown: Any) -> tuple:
        """Called after a restoration: the gaps or an option may have been changed while it ran. shown: as in hide_old_result."""
        if session.result_is_current(*self._request(*shown)):
            return gr.skip(), gr.skip()
        return rendering.REPLACED, gr.update(visible=False)

    @staticmethod
    def _request(token: str | None, text: str, face: int | None, sync: bool) -> tuple[str, str, int | None, str]:
        """(text, token, face, sync) as Session.restore takes them, of the values of the page."""
        return text, token or "", None if face is None or face < 0 else int(face), "auto" if sync else "off"

    def restore(self, session: Session, token: str, text: str, face: int | None, sync: bool) -> tuple:
        """Values of RESULT_OUTPUTS."""
        result = session.restore(*self._request(token, text, face, sync))
        plots = rendering.compared(session.clip, result, result.gaps)
        waveforms = {name: str(file) for name, file in result.waveforms.items()}
        players = [v for name in WAVEFORMS for v in (waveforms.get(name), plots.get(name, ""))]
        files = gr.update(value=str(result.clip), label=f"Download {result.clip.name}"), waveforms["restored"]
        visible = gr.update(visible=True), gr.update(visible="original" in waveforms)
        return *visible, rendering.summary(result), *players, rendering.faces(result), *files
