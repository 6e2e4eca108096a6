"""What other programs read and say: files in others' formats, and OpenAI's protocol on both sides."""
