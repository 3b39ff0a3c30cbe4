"""Measuring tools and pictures. The core never imports them; they need the extra ``hf_sdp[bench]``."""
