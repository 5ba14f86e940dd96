"""A local OpenID Connect provider: discovery, authorization code with PKCE, signed ID tokens; some of its answers lie."""

import base64
import hashlib
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Form, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT = "mu2-review"
SECRET = "provider-secret"


@dataclass
class Provider:
    """Who logs in at the provider, and how it behaves."""

    username: str = "reader"
    subject: str = "subject-1"
    logged_in_at: int = field(default_factory=lambda: int(time.time()) - 3600)
    obeys_prompt: bool = True  # asks for the password again when told to
    sends_auth_time: bool = True
    nonce: str | None = None  # a nonce of its own instead of ours
    audience: str = CLIENT
    foreign_key: bool = False  # signs with a key that it does not publish
    unsigned: bool = False  # sends a token that nobody signed
    seen: list[dict[str, str]] = field(default_factory=list)  # parameters of each authorization request
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1"}))
    issuer: str = ""

    def app(self) -> FastAPI:
        """The provider as an application."""
        app = FastAPI()

        @app.get("/.well-known/openid-configuration")
        def configuration(request: Request) -> dict[str, str]:
            base = self.issuer
            return {
                "issuer": base,
                "authorization_endpoint": f"{base}/authorize",
                "token_endpoint": f"{base}/token",
                "jwks_uri": f"{base}/jwks",
            }

        @app.get("/jwks")
        def keys() -> dict[str, Any]:
            return {"keys": [self.key.as_dict(private=False)]}

        @app.get("/authorize")
        def authorize(request: Request) -> Response:
            asked = dict(request.query_params)
            self.seen.append(asked)
            if asked.get("prompt") == "login" and self.obeys_prompt:
                self.logged_in_at = int(time.time())
            code = secrets.token_urlsafe(16)
            self.codes[code] = asked
            answer = urlencode({"code": code, "state": asked["state"]})
            return RedirectResponse(f"{asked['redirect_uri']}?{answer}", status_code=302)

        @app.post("/token")
        def token(request: Request, code: str = Form(), code_verifier: str = Form()) -> Response:
            asked = self.codes.pop(code)
            digest = base64.urlsafe_b64encode(hashlib.sha256(code_verifier.encode()).digest()).rstrip(b"=").decode()
            credentials = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
            if digest != asked["code_challenge"] or request.headers.get("authorization") != f"Basic {credentials}":
                return JSONResponse({"error": "invalid_grant"}, status_code=400)
            return JSONResponse(
                {"access_token": secrets.token_urlsafe(8), "token_type": "Bearer", "id_token": self._id_token(asked)}
            )

        return app

    def _id_token(self, asked: dict[str, str]) -> str:
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "sub": self.subject,
            "aud": self.audience,
            "iat": now,
            "exp": now + 60,
            "nonce": self.nonce or asked["nonce"],
            "preferred_username": self.username,
        }
        if self.sends_auth_time:
            claims["auth_time"] = self.logged_in_at
        if self.unsigned:
            parts = ('{"alg":"none"}', json.dumps(claims), "")
            return ".".join(base64.urlsafe_b64encode(p.encode()).rstrip(b"=").decode() for p in parts)
        key = RSAKey.generate_key(2048, {"kid": "1"}) if self.foreign_key else self.key
        return jwt.encode({"alg": "RS256", "kid": "1"}, claims, key)
