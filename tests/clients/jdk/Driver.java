import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** The JDK's own HTTP client as it is: it asks for HTTP/2 with every request. Run as `java Driver.java RESULTS`. */
class Driver {
    static final Map<String, String> ENVIRONMENT = System.getenv();
    static final Pattern IMAGE = Pattern.compile("\"b64_json\":\\s*\"([^\"]+)\"");
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    static String post(String path, String contentType, BodyPublisher body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(ENVIRONMENT.get("OPENAI_BASE_URL") + path))
                .header("Authorization", "Bearer " + ENVIRONMENT.get("OPENAI_API_KEY"))
                .header("Content-Type", contentType)
                .POST(body)
                .build();
        HttpResponse<String> response = CLIENT.send(request, BodyHandlers.ofString());
        if (response.statusCode() != 200) throw new IOException(response.statusCode() + " " + response.body());
        return response.body();
    }

    static String prompt(String more) {
        return "{\"prompt\": \"" + ENVIRONMENT.get("HYPERGEN_PROMPT") + "\", \"size\": \"1024x1024\"" + more + "}";
    }

    static String generate() throws Exception {
        return post("/images/generations", "application/json", BodyPublishers.ofString(prompt("")));
    }

    /** A body whose length is not known before: it goes in chunks. */
    static String stream() throws Exception {
        byte[] body = prompt(", \"stream\": true, \"partial_images\": 2").getBytes(StandardCharsets.UTF_8);
        return post("/images/generations", "application/json",
                BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body)));
    }

    static String edit() throws Exception {
        return form("/images/edits", Map.of("image", "IMAGE", "mask", "MASK"),
                "prompt", ENVIRONMENT.get("HYPERGEN_EDIT_PROMPT"));
    }

    static String vary() throws Exception {
        return form("/images/variations", Map.of("image", "IMAGE"), "response_format", "b64_json");
    }

    static String form(String path, Map<String, String> files, String field, String value)
            throws Exception {
        String boundary = "----a-boundary";
        ByteArrayOutputStream body = new ByteArrayOutputStream();
        for (Map.Entry<String, String> file : files.entrySet()) {
            String name = file.getKey();
            body.write(("--" + boundary + "\r\nContent-Disposition: form-data; name=\"" + name + "\"; filename=\"" + name
                    + ".png\"\r\nContent-Type: image/png\r\n\r\n").getBytes(StandardCharsets.UTF_8));
            body.write(Files.readAllBytes(Path.of(ENVIRONMENT.get("HYPERGEN_" + file.getValue()))));
            body.write("\r\n".getBytes(StandardCharsets.UTF_8));
        }
        body.write(("--" + boundary + "\r\nContent-Disposition: form-data; name=\"" + field + "\"\r\n\r\n" + value
                + "\r\n").getBytes(StandardCharsets.UTF_8));
        body.write(("--" + boundary + "--\r\n").getBytes(StandardCharsets.UTF_8));
        return post(path, "multipart/form-data; boundary=" + boundary, BodyPublishers.ofByteArray(body.toByteArray()));
    }

    static String outcome(Callable<String> operation) {
        try {
            List<String> images = new ArrayList<>();
            Matcher found = IMAGE.matcher(operation.call());
            while (found.find()) images.add("\"" + found.group(1) + "\"");
            return "{\"images\": [" + String.join(", ", images) + "]}";
        } catch (Exception error) {
            String message = error.toString().replaceAll("[\"\\\\\\p{Cntrl}]", " ");
            return "{\"error\": \"" + message + "\"}";
        }
    }

    public static void main(String[] arguments) throws IOException {
        String results = String.format("{\"generate\": %s, \"edit\": %s, \"stream\": %s, \"vary\": %s}",
                outcome(Driver::generate), outcome(Driver::edit), outcome(Driver::stream), outcome(Driver::vary));
        Files.writeString(Path.of(arguments[0]), results);
    }
}
