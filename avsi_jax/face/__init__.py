"""The visual front end: face landmarks, mouth visibility, audio-video offset."""
