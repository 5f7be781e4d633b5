"""One Triton process: installed, started, watched and stopped."""
