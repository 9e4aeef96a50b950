"""Speech synthesis with eSpeak NG in a child process: text -> audio, word times and phone times.

eSpeak NG is under the GPL: it comes in the wheel `espeakng-loader` (extra `synth`) and is never loaded into our own process. This
file run as a script is the child process: it needs only the standard library and that wheel. It reads one JSON request per line
from stdin and answers with a JSON line {bytes, rate, words, phones}, or {error}, followed by that many bytes of int16 audio.

The child forks for every utterance, because eSpeak NG keeps state: the same text gives other bytes the second time in one process.
It is not thread-safe either, so every worker process has its own child.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys

# From espeak_ng/speak_lib.h.
SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: Synth returns when it has finished, audio goes to the callback
PHONEME_EVENTS, DONT_EXIT = 0x0001, 0x8000  # of espeak_Initialize
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
END_OF_EVENTS, WORD_EVENT, PHONEME_EVENT = 0, 1, 7  # espeak_EVENT_TYPE
CHARS_UTF8, PHONEMES = 0x0001, 0x0100  # of espeak_Synth; PHONEMES: [[...]] in the text are phones


class EspeakError(OSError):
    """The child process has ended, or eSpeak NG reports an error."""


@dataclasses.dataclass(frozen=True)
class Voice:
    """A voice's settings. `name` is its file, `gmw/en-US+f4`: for names such as `en-us` eSpeak NG may choose another voice."""

    name: str
    pitch: int  # 0 to 99; 50 is the voice's default
    pitch_range: int  # 0 to 99; 0 is monotone
    words_per_minute: int


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Synthetic speech. Times are sample indices; the phone of a stop begins at its burst, not at its closure."""

    pcm: bytes  # int16, mono
    rate: int  # Hz
    words: tuple[int, ...]  # start of each word
    phones: tuple[tuple[int, str], ...]  # start and name of each phone; names with _ are pauses


class Espeak:
    """The child process. It ends when its stdin closes, so at the latest with this process."""

    def __init__(self):
        # -P: this file's folder must not hide modules of the standard library from the child
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._child = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C reaches only us

    def synthesize(self, text: str, voice: Voice, seed: int) -> Utterance:
        """Speech of the text; the same arguments give the same bytes. seed: for the noise in breathy voices."""
        request = {"text": text, "seed": seed} | dataclasses.asdict(voice)
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
            answer = json.loads(self._child.stdout.readline() or '{"error": "its process has ended"}')
        except BrokenPipeError:
            answer = {"error": "its process has ended"}
        if "error" in answer:
            raise EspeakError(f"eSpeak NG can't synthesize {text!r} with voice {voice.name}: {answer['error']}")
        pcm = self._child.stdout.read(answer["bytes"])
        return Utterance(pcm, answer["rate"], tuple(answer["words"]), tuple((at, name) for at, name in answer["phones"]))

    def close(self) -> None:
        """Ends the child process."""
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()


# ------------------------------------------------------------------------------------------------------------- the child


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT"""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


class _Recorder:
    """Collects the audio and events that eSpeak NG passes to its callback."""

    def __init__(self):
        self.pcm, self.words, self.phones = bytearray(), [], []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self.callback = kind(self._receive)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self.pcm.extend(ctypes.string_at(samples, 2 * count))
        i = 0
        while events[i].type != END_OF_EVENTS:
            event = events[i]
            if event.type == WORD_EVENT:
                self.words.append(event.sample)
            elif event.type == PHONEME_EVENT:
                self.phones.append((event.sample, bytes(event.id.string).split(b"\0")[0].decode()))
            i += 1
        return 0  # continue


def _synthesize(request: dict) -> bytes:
    """The answer to one request. Call it only once in a process."""
    import espeakng_loader

    data = espeakng_loader.get_data_path()
    variant = request["name"].partition("+")[2]
    if variant and not os.path.exists(os.path.join(data, "voices", "!v", variant)):
        raise EspeakError("no such variant")  # eSpeak NG itself would silently ignore it
    library, recorder = ctypes.CDLL(espeakng_loader.get_library_path()), _Recorder()
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), PHONEME_EVENTS | DONT_EXIT)
    library.espeak_SetSynthCallback(recorder.callback)
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_ng_SetRandSeed(request["seed"])  # by default seeded by the clock
    if library.espeak_SetVoiceByName(request["name"].encode()) != 0:
        raise EspeakError("no such voice")
    for parameter, field in ((RATE, "words_per_minute"), (PITCH, "pitch"), (RANGE, "pitch_range")):
        library.espeak_SetParameter(parameter, request[field], 0)
    text = request["text"].encode() + b"\0"
    if library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, CHARS_UTF8 | PHONEMES, None, None) != 0:
        raise EspeakError("synthesis failed")
    library.espeak_Synchronize()
    pcm = bytes(recorder.pcm)
    return _header(bytes=len(pcm), rate=rate, words=recorder.words, phones=recorder.phones) + pcm


def _header(**fields) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _synthesize_in_fork(request: dict) -> bytes:
    """_synthesize in a process of its own; an error of any kind becomes an answer."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            answer = _synthesize(request)
        except Exception as e:
            answer = _header(error=f"{e}" or type(e).__name__)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(process, 0)
    return answer or _header(error="it crashed")


def _serve() -> None:
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_synthesize_in_fork(json.loads(line)))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
