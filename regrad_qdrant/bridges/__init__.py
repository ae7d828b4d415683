"""The pipeline as a component of other frameworks: langchain, llama_index, haystack, each by itself."""
