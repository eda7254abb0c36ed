# docker build -t captioner . && docker run --rm -p 8000:8000 captioner    then open http://127.0.0.1:8000
FROM python:3.13-slim AS build
COPY . /source
RUN python -m venv /opt/captioner && /opt/captioner/bin/pip install --no-cache-dir "/source[web]"

FROM python:3.13-slim
COPY --from=build /opt/captioner /opt/captioner
RUN useradd --system captioner
USER captioner
EXPOSE 8000
HEALTHCHECK --start-period=10s CMD ["/opt/captioner/bin/python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["/opt/captioner/bin/caption-web", "--host", "0.0.0.0"]
