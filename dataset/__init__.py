"""Offline builders: from raw files to arrays that training maps. Never imports torch."""
